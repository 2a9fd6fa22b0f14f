"""A disk tier that is killed in the middle of writes and then damaged, again and again in one folder.

The long form is ``pytest -m slow -s packages/dynamo-kvbm/tests/unit/tiers/test_disk_crashes.py``; it prints its counts.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dynamo_kvbm import DiskTier
from dynamo_kvbm._tiers.slot_file import RECORD, slot_stride

CAPACITY = 24
BATCH = 4
DEADLINE_S = 60.0

WRITER = """
import random, sys
from pathlib import Path
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm import DiskTier

folder, size, key = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tier = DiskTier(folder, 24, size)
while True:
    keys = range(key, key + 4)
    blocks = [BlockDescriptor(k, 0, k - 1 if k % 4 else None, k % 4) for k in keys]
    evicted = tier.put(blocks, [random.Random(k).randbytes(size) for k in keys])
    print(*keys, *(-k for k in evicted), flush=True)
    key += 4
"""


@dataclass
class Counts:
    """What a run did and found."""

    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    damaged: int = 0
    detected: int = 0
    wrong: int = 0


class Crashes:
    """One folder, its writers, and what they acknowledged."""

    def __init__(self, folder: Path, size: int, seed: int) -> None:
        self.folder = folder
        self.size = size
        self.rng = random.Random(seed)
        self.held: set[int] = set()
        self.next_key = 4
        self.counts = Counts()

    def content(self, key: int) -> bytes:
        return random.Random(key).randbytes(self.size)

    def write_and_kill(self) -> None:
        """Let a writer run for a while and kill it wherever it is."""
        arguments = [str(self.folder), str(self.size), str(self.next_key)]
        with subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(self.rng.randint(1, 30)):
                self.acknowledge(writer.stdout.readline())
            writer.kill()
            for line in writer.stdout:
                self.acknowledge(line)
            writer.wait(DEADLINE_S)
        self.counts.kills += 1

    def acknowledge(self, line: str) -> None:
        numbers = [int(part) for part in line.split()]
        if not line.endswith("\n") or not numbers:
            return
        stored = {number for number in numbers if number > 0}
        self.held = (self.held - {-number for number in numbers if number < 0}) | stored
        self.next_key = max(self.next_key, max(stored) + BATCH)
        self.counts.acknowledged += len(stored)

    def require_whole(self) -> None:
        """Require that nothing but whole blocks is there, and that what was acknowledged is."""
        tier = DiskTier(self.folder, CAPACITY, self.size)
        tier.check_integrity()
        present = {block.sequence_hash for block in tier.held()}
        self.compare(tier, present)
        lost = self.held - present
        # What was under way may have pushed out as many as it brought, and could not say so.
        assert len(lost) <= BATCH, f"{len(lost)} acknowledged blocks are gone"
        self.counts.lost += len(lost)
        self.next_key = max(self.next_key, max(present, default=0) // BATCH * BATCH + BATCH)
        self.held = present
        tier.close()

    def damage_and_look(self) -> None:
        """Damage blocks and records behind the tier's back; none of them may be served, all others must be."""
        tier = DiskTier(self.folder, CAPACITY, self.size)
        places = {key: (place.segment, place.slot) for key, place in vars(tier)["_places"].items()}
        tier.close()
        victims = self.rng.sample(sorted(places), min(len(places), self.rng.randint(1, 6)))
        for key in victims:
            self.damage(*places[key])
        tier = DiskTier(self.folder, CAPACITY, self.size)
        found = dict(zip(places, tier.get(list(places)), strict=True))
        self.counts.damaged += len(victims)
        self.counts.detected += sum(found[key] is None for key in victims)
        self.compare(tier, places.keys() - set(victims))
        tier.check_integrity()
        self.held = {block.sequence_hash for block in tier.held()}
        tier.close()

    def damage(self, segment: int, slot: int) -> None:
        if self.rng.random() < 0.5:
            path, start, length = f"{segment:04d}.data", slot * slot_stride(self.size), self.size
        else:
            path, start, length = f"{segment:04d}.index", slot * RECORD.itemsize, RECORD.itemsize
        if self.rng.random() < 0.5:
            self.flip(path, start + self.rng.randrange(length))
        else:
            self.tear(path, start, length)

    def flip(self, path: str, offset: int) -> None:
        """Change one bit."""
        with (self.folder / path).open("r+b") as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ (1 << self.rng.randrange(8))]), offset)

    def tear(self, path: str, start: int, length: int) -> None:
        """Put other bytes in place of the end of it, as a write that was cut short leaves."""
        kept = self.rng.randrange(length)
        with (self.folder / path).open("r+b") as file:
            before = os.pread(file.fileno(), length - kept, start + kept)
            os.pwrite(file.fileno(), bytes(byte ^ 0xFF for byte in before), start + kept)

    def compare(self, tier: DiskTier, keys: set[int]) -> None:
        wrong = [key for key in keys if tier.get([key]) != [self.content(key)]]
        self.counts.wrong += len(wrong)
        assert wrong == []


SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("size", [4096, 65536])
@pytest.mark.parametrize("rounds", [pytest.param(2), pytest.param(100, marks=SLOW)])
def test_no_wrong_byte_is_served_and_all_damage_is_noticed(tmp_path: Path, size: int, rounds: int) -> None:
    crashes = Crashes(tmp_path, size, seed=rounds)
    for _ in range(rounds):
        crashes.write_and_kill()
        crashes.require_whole()
        for _ in range(3):
            crashes.damage_and_look()
    counts = crashes.counts
    print(counts)
    assert (counts.wrong, counts.detected) == (0, counts.damaged)
    assert counts.kills == rounds
