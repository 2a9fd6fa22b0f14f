"""Running a leg: what went wrong, or None."""

from __future__ import annotations

from dynamo_tools.compat import cluster
from dynamo_tools.compat.environments import Environments
from dynamo_tools.compat.matrix import ClusterLeg, Leg, TestLeg, WireLeg
from dynamo_tools.process import clean_environment, run
from dynamo_tools.workspace import CORE

_READ = """
import sys
from pathlib import Path
from dynamo_core.wire import CODECS
files = {path.name.removesuffix(".msgpack"): path for path in Path(sys.argv[1]).rglob("*.msgpack")}
assert files, "no golden files"
if sys.argv[2] == "all":
    gone = sorted(files.keys() - CODECS.keys())
    assert not gone, f"no codec reads {gone}"
for name in files.keys() & CODECS.keys():
    value = CODECS[name].decode(files[name].read_bytes())
    assert CODECS[name].decode(CODECS[name].encode(value)) == value, f"{name} does not survive its own codec"
print(len(files.keys() & CODECS.keys()), "types read")
"""
_OF_DEPRECATION = ("DeprecationWarning", "FutureWarning")
"""What a newer core may tell an older component that still uses what is on its way out: notice, and no failure."""


def run_leg(environments: Environments, leg: Leg) -> str | None:
    """Run a leg; return what went wrong, or None.

    Raises:
        LookupError: if an environment cannot be made, which is a failure of the leg too.
    """
    try:
        if isinstance(leg, TestLeg):
            return _tests(environments, leg)
        return _wire(environments, leg) if isinstance(leg, WireLeg) else _cluster(environments, leg)
    except LookupError as error:
        return str(error.args[0])


def _tests(environments: Environments, leg: TestLeg) -> str | None:
    package = environments.source(leg.package, leg.tests)
    group = [str(entry) for entry in package.config.get("dependency-groups", {}).get("test", [])]
    python = environments.python({leg.package: leg.tests, CORE: leg.core}, group)
    folder = environments.tests(leg.package, leg.tests)
    argv = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"packages/{package.folder.name}/tests"]
    argv += [] if leg.tests is None else [f"-Wdefault::{kind}" for kind in _OF_DEPRECATION]
    result = run(argv, folder, env=clean_environment())
    return result.tail(25) if result.returncode else None


def _wire(environments: Environments, leg: WireLeg) -> str | None:
    written = environments.source(CORE, leg.writer).src / "testing" / "golden"
    python = environments.python({CORE: leg.reader})
    # What an older release wrote must all be read; of a newer one, what the older release knows.
    known = "all" if leg.reader is None else "known"
    result = run([str(python), "-c", _READ, str(written), known], environments.folder, env=clean_environment())
    return result.tail() if result.returncode else None


def _cluster(environments: Environments, leg: ClusterLeg) -> str | None:
    frontend = environments.python(dict(leg.frontend))
    if leg.planner:
        return cluster.planned(frontend, environments.python(dict(leg.planner)))
    return cluster.served(frontend, [environments.python(dict(worker)) for worker in leg.workers])
