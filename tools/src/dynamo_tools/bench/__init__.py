"""Benchmarks, one module each: a module of this package with ``run(options)`` that returns figures.

CPU time per unit of work (user and system, of the server processes) is the main figure, wall time the second. A rival
that cannot be installed is reported as null.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dynamo_tools.bench.figure import Figure

__all__ = ["NAMES", "Benchmark", "Figure", "Options", "load"]

NAMES = ("runtime", "router", "frontend", "worker", "kvbm", "planner")


@dataclass(frozen=True)
class Options:
    """What a benchmark is told.

    Attributes:
        root: Root of the workspace.
        quick: Fewer and shorter runs: it shows that the benchmark works, its figures are rough.
    """

    root: Path
    quick: bool = False

    @property
    def runs(self) -> int:
        """Runs of each figure."""
        return 3 if self.quick else 9

    @property
    def cache(self) -> Path:
        """Folder of the rivals' environments."""
        return self.root / ".bench-cache"


Benchmark = Callable[[Options], list[Figure]]


def load(name: str) -> Benchmark:
    """Return a benchmark.

    Raises:
        LookupError: if the name has none; the message lists those that there are.
    """
    module = f"{__name__}.{name}"
    if name not in NAMES or importlib.util.find_spec(module) is None:
        there = [item for item in NAMES if importlib.util.find_spec(f"{__name__}.{item}")]
        raise LookupError(f"no benchmark {name!r}; there are {', '.join(there)}")
    benchmark: Benchmark = importlib.import_module(module).run
    return benchmark
