"""Looks into a disk tier's folder without owning it: nothing is written, and its owner may be running."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynamo_core.errors import ConfigurationError
from dynamo_kvbm._tiers.slot_file import (
    RECORD,
    USED,
    StoredBlock,
    data_checksum,
    slot_stride,
    stored_block,
    whole_record,
)


@dataclass(frozen=True)
class FolderReport:
    """What a folder holds.

    Attributes:
        identity: What its blocks are of.
        segments: Pairs of data and index files.
        slots: Room for blocks.
        blocks: Blocks with a whole record.
        damaged_records: Records that do not fit their checksum.
        damaged_blocks: Blocks that do not fit their checksum; None if they were not read.
        data_bytes: Size of the data files.
        index_bytes: Size of the index files.
        sequences: Blocks that start a sequence.
        longest_blocks: Length of the longest sequence, by position.
    """

    identity: dict[str, object]
    segments: int
    slots: int
    blocks: int
    damaged_records: int
    damaged_blocks: int | None
    data_bytes: int
    index_bytes: int
    sequences: int
    longest_blocks: int


def inspect_folder(folder: Path, *, verify: bool = False) -> FolderReport:
    """Read a disk tier's folder.

    Args:
        folder: A ``disk_dir``.
        verify: Read every block and compare it with its checksum. A running owner may change blocks meanwhile, which
            then count as damaged.

    Raises:
        ConfigurationError: if it is no disk tier's folder, or cannot be read.
    """
    try:
        identity = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
        paths = sorted(folder.glob("*.index"))
        found = [_records(path) for path in paths]
        slot_bytes = int(identity["block_bytes"])
        damaged = sum(_damaged(*pair, slot_bytes) for pair in zip(paths, found, strict=True)) if verify else None
        data_bytes = sum(path.with_suffix(".data").stat().st_size for path in paths)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{folder} is no readable folder of a disk tier: {error}; give a disk_dir") from error
    descriptors = [stored.descriptor for blocks, _, _ in found for stored in blocks.values()]
    return FolderReport(
        identity=identity,
        segments=len(paths),
        slots=sum(slots for _, slots, _ in found),
        blocks=len(descriptors),
        damaged_records=sum(bad for _, _, bad in found),
        damaged_blocks=damaged,
        data_bytes=data_bytes,
        index_bytes=sum(slots for _, slots, _ in found) * RECORD.itemsize,
        sequences=sum(block.parent_hash is None for block in descriptors),
        longest_blocks=max((block.position + 1 for block in descriptors), default=0),
    )


def _records(path: Path) -> tuple[dict[int, StoredBlock], int, int]:
    """Return the blocks of an index by slot, its number of slots, and how many records are damaged."""
    records = np.fromfile(path, dtype=RECORD)
    used = [int(slot) for slot in np.flatnonzero(records["flags"] & USED)]
    blocks = {slot: stored_block(records[slot]) for slot in used if whole_record(records[slot])}
    return blocks, len(records), len(used) - len(blocks)


def _damaged(index: Path, found: tuple[dict[int, StoredBlock], int, int], slot_bytes: int) -> int:
    damaged = 0
    with index.with_suffix(".data").open("rb") as file:
        for slot, stored in found[0].items():
            file.seek(slot * slot_stride(slot_bytes))
            data = file.read(slot_bytes)
            damaged += data_checksum(stored.descriptor.sequence_hash, data) != stored.data_checksum
    return damaged
