"""Which combinations of releases are tried."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_tools.compat.environments import Choice, label
from dynamo_tools.releases import Release, previous, releases
from dynamo_tools.releasing import oldest_core
from dynamo_tools.semver.judge import fragments
from dynamo_tools.workspace import CORE, Package, Workspace

FRONTEND_PROCESS = ("dynamo-frontend", "dynamo-router")
WORKER_PROCESS = ("dynamo-worker",)
PLANNER_PROCESS = ("dynamo-planner",)
_HOST = (CORE, "dynamo-runtime")


@dataclass(frozen=True)
class TestLeg:
    """The tests of one package, of one release, with that package and core of chosen releases."""

    __test__ = False

    package: str
    tests: Choice
    core: Choice

    def __str__(self) -> str:
        """Return its name in the report."""
        return f"tests of {self.package} {label(self.tests)} on {CORE} {label(self.core)}"


@dataclass(frozen=True)
class WireLeg:
    """Golden files that one core wrote, read by another."""

    writer: Choice
    reader: Choice

    def __str__(self) -> str:
        """Return its name in the report."""
        return f"golden files of {CORE} {label(self.writer)} read by {label(self.reader)}"


@dataclass(frozen=True)
class ClusterLeg:
    """Processes of two releases in one cluster.

    Attributes:
        name: Name in the report.
        frontend: Releases in the frontend's process.
        workers: Releases in each worker's process.
        planner: Releases in a planner's process; empty for none.
    """

    name: str
    frontend: tuple[tuple[str, Choice], ...]
    workers: tuple[tuple[tuple[str, Choice], ...], ...]
    planner: tuple[tuple[str, Choice], ...] = ()

    def __str__(self) -> str:
        """Return its name in the report."""
        return f"cluster: {self.name}"


Leg = TestLeg | WireLeg | ClusterLeg


def legs(workspace: Workspace) -> list[Leg]:
    """Every leg that the recorded releases allow; none before the first release."""
    last = {package.name: neighbour(workspace, package) for package in workspace.packages}
    return [*_test_legs(workspace, last), *_wire_legs(workspace, last), *_cluster_legs(last)]


def neighbour(workspace: Workspace, package: Package) -> Release | None:
    """The release that a checkout must get along with: its last one, or the one before if the checkout is that one.

    Raises:
        LookupError: if its commit is not in this clone.
    """
    known = releases(workspace, package.name)
    is_released = package.version in {release.version for release in known} and not fragments(package)
    if len(known) > 1 and is_released:
        return next(release for release in reversed(known) if release.version != package.version)
    return previous(workspace, package)


def _test_legs(workspace: Workspace, last: dict[str, Release | None]) -> list[Leg]:
    found: list[Leg] = []
    for package in workspace.components:
        if release := last[package.name]:
            found.append(TestLeg(package.name, release, None))
        if core := oldest_core(workspace, package):
            found.append(TestLeg(package.name, None, core))
    return found


def _wire_legs(workspace: Workspace, last: dict[str, Release | None]) -> list[Leg]:
    oldest = [oldest_core(workspace, package) for package in workspace.components]
    cores = dict.fromkeys(core for core in [last[CORE], *oldest] if core)
    return [leg for core in cores for leg in (WireLeg(core, None), WireLeg(None, core))]


def _cluster_legs(last: dict[str, Release | None]) -> list[Leg]:
    needed = {*_HOST, *FRONTEND_PROCESS, *WORKER_PROCESS}
    if not all(last.get(name) for name in needed):
        return []

    def process(packages: tuple[str, ...], *old: str) -> tuple[tuple[str, Choice], ...]:
        return tuple((name, last[name] if name in old else None) for name in (*_HOST, *packages))

    old_frontend = process(FRONTEND_PROCESS, *_HOST, *FRONTEND_PROCESS)
    new_frontend = process(FRONTEND_PROCESS)
    old_worker, new_worker = process(WORKER_PROCESS, *_HOST, *WORKER_PROCESS), process(WORKER_PROCESS)
    found: list[Leg] = [
        ClusterLeg("old frontend, new workers", old_frontend, (new_worker, new_worker)),
        ClusterLeg("new frontend, old workers", new_frontend, (old_worker, old_worker)),
        ClusterLeg("new frontend, one old and one new worker", new_frontend, (old_worker, new_worker)),
        ClusterLeg(
            "old router in a new frontend", process(FRONTEND_PROCESS, "dynamo-router"), (new_worker, new_worker)
        ),
        ClusterLeg(
            "new router in an old frontend, old workers",
            process(FRONTEND_PROCESS, "dynamo-frontend"),
            (old_worker, old_worker),
        ),
    ]
    if last.get(PLANNER_PROCESS[0]):
        old_planner = process(PLANNER_PROCESS, *_HOST, *PLANNER_PROCESS)
        old_host = process((*FRONTEND_PROCESS, *WORKER_PROCESS), *_HOST, *FRONTEND_PROCESS, *WORKER_PROCESS)
        new_host = process((*FRONTEND_PROCESS, *WORKER_PROCESS))
        found.append(ClusterLeg("old planner, new supervisor", new_host, (), old_planner))
        found.append(ClusterLeg("new planner, old supervisor", old_host, (), process(PLANNER_PROCESS)))
    return found
