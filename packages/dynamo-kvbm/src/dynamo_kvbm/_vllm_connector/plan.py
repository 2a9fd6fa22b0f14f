"""What the scheduler's side tells the workers' side in a step, and hears back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynamo_core.kv import BlockDescriptor


@dataclass(frozen=True)
class Load:
    """Blocks of one request to copy in, in order."""

    sequence_hashes: tuple[int, ...]
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class Store:
    """Blocks of one request that this step completes."""

    blocks: tuple[BlockDescriptor, ...]
    block_ids: tuple[int, ...]


@dataclass
class Plan:
    """One step.

    Attributes:
        loads: What to copy in before the forward pass.
        stores: What to copy out after it.
        is_clear: Whether to forget everything first.
    """

    loads: list[Load] = field(default_factory=list[Load])
    stores: list[Store] = field(default_factory=list[Store])
    is_clear: bool = False


@dataclass(frozen=True)
class Changes:
    """How many workers gained a block more often than they lost it, by sequence hash."""

    gained: Mapping[int, int]

    def merged(self, other: Changes) -> Changes:
        """Return the changes of both."""
        gained = dict(self.gained)
        for name, count in other.gained.items():
            gained[name] = gained.get(name, 0) + count
        return Changes({name: count for name, count in gained.items() if count})
