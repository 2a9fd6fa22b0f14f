"""A child forked from a process that has tiers: it is told, harms nothing, and does not keep its parent's locks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm import DiskTier
from dynamo_kvbm._tiers.shared_host import SharedHostTier

DEADLINE_S = 30.0

PARENT = """
import os, sys
from pathlib import Path
from dynamo_core.errors import ConflictError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._tiers.disk import DiskTier
from dynamo_kvbm._tiers.shared_host import SharedHostTier

Tier = {"DiskTier": DiskTier, "SharedHostTier": SharedHostTier}[sys.argv[1]]
folder = Path(sys.argv[2])
tier = Tier(folder, 4, 512)
tier.put([BlockDescriptor(1)], [b"a" * 512])


def say(line):
    os.write(1, f"{line}\\n".encode())  # in one piece: two processes write here


def told(call):
    try:
        call()
    except ConflictError as error:
        return "belongs to its parent; make it after the fork" in error.message
    return False


def child():
    calls = [
        lambda: tier.contains([1]),
        lambda: tier.get([1]),
        lambda: tier.put([BlockDescriptor(2)], [b"b" * 512]),
        lambda: tier.touch([1]),
        lambda: tier.remove([1]),
        tier.held,
        tier.check_integrity,
    ]
    say(f"told {[told(call) for call in calls]}")
    tier.close()
    tier.close()


def fork():
    pid = os.fork()
    if not pid:
        child()
        say("waits")
        sys.stdin.read()
        os._exit(0)
    return pid


if hasattr(tier, "lend"):
    with tier.lend([1]):
        fork()  # in the child the context ends with the process, in the parent here
else:
    fork()
assert bytes(tier.get([1])[0]) == b"a" * 512
tier.put([BlockDescriptor(3)], [b"c" * 512])
tier.check_integrity()
say("parent is whole")
os._exit(0)  # as suddenly as a kill: nothing is closed
"""


@pytest.mark.parametrize("kind", [DiskTier, SharedHostTier])
def test_a_forked_child_is_told_and_its_parent_s_tier_stays_whole(
    kind: type[DiskTier] | type[SharedHostTier], tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT, kind.__name__, str(tmp_path / "tier")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline() for _ in range(3)}
        assert lines == {f"told {[True] * 7}\n", "waits\n", "parent is whole\n"}
        parent.wait(DEADLINE_S)
        # The child lives on. If it kept the locks, the folder would be in use and the dead parent would seem alive.
        successor = kind(tmp_path / "tier", 4, 512)
        assert [piece is not None for piece in successor.get([1, 2, 3])] == [True, False, True]
        fresh = [BlockDescriptor(item) for item in range(10, 14)]
        successor.put(fresh, [b"d" * 512] * 4)
        assert successor.contains([10, 11, 12, 13]) == [True] * 4
        successor.check_integrity()
        successor.close()
        parent.communicate(timeout=DEADLINE_S)


MAKES_ITS_OWN = """
import os, sys
from pathlib import Path
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._tiers.shared_host import SharedHostTier

folder = Path(sys.argv[1])
tier = SharedHostTier(folder, 4, 512)
tier.put([BlockDescriptor(1)], [b"a" * 512])
pid = os.fork()
if not pid:
    own = SharedHostTier(folder, 4, 512)
    own.put([BlockDescriptor(2)], [b"b" * 512])
    found = own.get([1])
    own.close()
    os._exit(0 if found == [b"a" * 512] else 1)
_, status = os.waitpid(pid, 0)
print(status, tier.contains([1, 2]))
tier.check_integrity()
tier.close()
"""


def test_a_child_shares_through_a_tier_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MAKES_ITS_OWN, str(tmp_path / "tier")],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert done.stdout == "0 [True, True]\n"
