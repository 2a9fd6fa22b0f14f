"""Each order beside a naive one that looks at everything on every step, victim by victim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynamo_core.testing import FakeClock
from dynamo_kvbm._eviction.arc import ArcOrder
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.hinted import HintedOrder
from dynamo_kvbm._eviction.lineage import LineageOrder
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._eviction.multi_lru import LEVELS, MultiLruOrder
from dynamo_kvbm._eviction.priority import PriorityOrder
from dynamo_kvbm._eviction.s3fifo import MAX_FREQUENCY, S3FifoOrder

CAPACITY = 10
PATHS = [[1, 2, 3], [1, 2, 4], [1, 5], [6, 7], [8], [9], [10, 11], [12]]
PARENT = {item: path[i - 1] if i else None for path in PATHS for i, item in enumerate(path)}


class Naive:
    """Keeps blocks in a list, oldest first, and a set of pins; a subclass ranks."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.pins: dict[int, int] = {}

    def leaves(self) -> list[int]:
        parents = {PARENT[item] for item in self.held}
        return [item for item in self.held if item not in parents and not self.pins.get(item)]

    def ancestors(self, item: int) -> list[int]:
        """Return the block and its held ancestors as far as they are held without a gap, children first."""
        found: list[int] = []
        above: int | None = item
        while above is not None and above in self.held:
            found.append(above)
            above = PARENT[above]
        return found

    def renew(self, path: list[int]) -> None:
        for item in reversed(path):
            for one in self.ancestors(item):
                self.held.remove(one)
                self.held.append(one)

    def insert(self, path: list[int]) -> None:
        self.held += path
        self.renew(path)

    def touch(self, path: list[int]) -> None:
        self.renew(path)

    def rank(self, item: int) -> Any:
        raise AssertionError

    def evict(self) -> int | None:
        leaves = self.leaves()
        if not leaves:
            return None
        victim = min(leaves, key=self.rank)
        self.drop(victim)
        return victim

    def drop(self, item: int) -> None:
        self.held.remove(item)


class NaiveLru(Naive):
    def rank(self, item: int) -> Any:
        return self.held.index(item)


class NaivePriority(Naive):
    """Priority first, age second; an ancestor is worth what the best of its continuations is."""

    def __init__(self) -> None:
        super().__init__()
        self.priority: dict[int, int] = {}

    def insert(self, path: list[int]) -> None:
        self.priority.update(dict.fromkeys(path, 0))
        super().insert(path)

    def prioritise(self, item: int, priority: int) -> None:
        for position, one in enumerate(self.ancestors(item)):
            if position and self.priority[one] >= priority:
                break
            self.held.remove(one)
            self.held.append(one)
            self.priority[one] = priority

    def rank(self, item: int) -> Any:
        return self.priority[item], self.held.index(item)


class NaiveMultiLru(Naive):
    """The logarithm of the uses first, age second."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[int, int] = {}
        self.level: dict[int, int] = {}
        self.seen = 0

    def insert(self, path: list[int]) -> None:
        self.held += path
        self.touch(path)

    def touch(self, path: list[int]) -> None:
        walked = list(dict.fromkeys(one for item in reversed(path) for one in self.ancestors(item)))
        for one in walked:
            self.uses[one] = self.uses.get(one, 0) + 1
            self.seen += 1
        if self.seen >= 10 * CAPACITY:
            self.seen //= 2
            self.uses = {one: count // 2 for one, count in self.uses.items() if count > 1}
        for item in reversed(path):
            for one in self.ancestors(item):
                self.held.remove(one)
                self.held.append(one)
                self.level[one] = min(LEVELS - 1, max(0, self.uses.get(one, 0).bit_length() - 1))

    def rank(self, item: int) -> Any:
        return self.level[item], self.held.index(item)


class NaiveS3Fifo(Naive):
    """Two lists and a list of ghosts, walked as the paper says, with a second rule: only leaves go."""

    def __init__(self) -> None:
        super().__init__()
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []
        self.frequency: dict[int, int] = {}

    def insert(self, path: list[int]) -> None:
        for item in reversed(path):
            self.held.append(item)
            self.frequency[item] = 0
            if item in self.ghosts:
                self.ghosts.remove(item)
                self.main.append(item)
            else:
                self.small.append(item)

    def touch(self, path: list[int]) -> None:
        for item in path:
            self.frequency[item] = min(MAX_FREQUENCY, self.frequency[item] + 1)

    def evict(self) -> int | None:
        leaves = self.leaves()
        if not leaves:
            return None
        for _ in range((MAX_FREQUENCY + 2) * (len(self.held) + 1)):
            if self.small and (len(self.small) > 1 or not self.main):
                item = self.small.pop(0)
                if self.frequency[item]:
                    self.frequency[item] = 0
                    self.main.append(item)
                elif item not in leaves:
                    self.small.append(item)
                else:
                    self.ghosts = [*self.ghosts, item][-(CAPACITY - 1) :]
                    self.held.remove(item)
                    return item
            else:
                item = self.main.pop(0)
                if self.frequency[item] or item not in leaves:
                    self.frequency[item] = max(0, self.frequency[item] - 1)
                    self.main.append(item)
                else:
                    self.held.remove(item)
                    return item
        item = next(item for item in [*self.small, *self.main] if item in leaves)
        self.drop(item)
        return item

    def drop(self, item: int) -> None:
        self.held.remove(item)
        (self.small if item in self.small else self.main).remove(item)


class NaiveArc(Naive):
    """Four lists; the target of the first says which one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.recent: list[int] = []
        self.frequent: list[int] = []
        self.ghosts: dict[str, list[int]] = {"recent": [], "frequent": []}
        self.target = 0.0

    def insert(self, path: list[int]) -> None:
        for item in reversed(path):
            self.held.append(item)
            recent, frequent = len(self.ghosts["recent"]), len(self.ghosts["frequent"])
            if item in self.ghosts["recent"]:
                self.target = min(float(CAPACITY), self.target + max(1.0, frequent / recent))
                self.ghosts["recent"].remove(item)
                self.frequent.append(item)
            elif item in self.ghosts["frequent"]:
                self.target = max(0.0, self.target - max(1.0, recent / frequent))
                self.ghosts["frequent"].remove(item)
                self.frequent.append(item)
            else:
                self.recent.append(item)
        while self.ghosts["recent"] and len(self.recent) + len(self.ghosts["recent"]) > CAPACITY:
            self.ghosts["recent"].pop(0)
        while self.ghosts["frequent"] and len(self.held) + sum(map(len, self.ghosts.values())) > 2 * CAPACITY:
            self.ghosts["frequent"].pop(0)

    def touch(self, path: list[int]) -> None:
        for item in reversed(path):
            for one in self.ancestors(item):
                (self.recent if one in self.recent else self.frequent).remove(one)
                self.frequent.append(one)

    def evict(self) -> int | None:
        leaves = self.leaves()
        order = ["recent", "frequent"] if len(self.recent) > self.target else ["frequent", "recent"]
        for name in order:
            for item in self.recent if name == "recent" else self.frequent:
                if item in leaves:
                    self.drop(item)
                    self.ghosts[name].append(item)
                    return item
        return None

    def drop(self, item: int) -> None:
        self.held.remove(item)
        (self.recent if item in self.recent else self.frequent).remove(item)


class NaiveLineage(Naive):
    """The oldest leaf; a block that becomes a leaf by a loss is the oldest of all."""

    def __init__(self) -> None:
        super().__init__()
        self.tips: list[int] = []

    def insert(self, path: list[int]) -> None:
        self.held += path
        parents = {PARENT[item] for item in self.held}
        self.tips = [item for item in self.tips if item not in parents]
        self.tips += [item for item in reversed(path) if item not in parents]

    def touch(self, path: list[int]) -> None:
        for item in path:
            if item in self.tips:
                self.tips.remove(item)
                self.tips.append(item)

    def rank(self, item: int) -> Any:
        return self.tips.index(item)

    def drop(self, item: int) -> None:
        self.held.remove(item)
        self.tips.remove(item)
        parent = PARENT[item]
        if parent in self.held and parent not in {PARENT[one] for one in self.held}:
            assert parent is not None
            self.tips.insert(0, parent)


class OrderMachine(RuleBasedStateMachine):
    """The same steps for both; every victim must be the same."""

    make_order: ClassVar[Callable[[int], EvictionOrder]]
    make_model: ClassVar[Callable[[], Naive]]

    def __init__(self) -> None:
        super().__init__()
        self.order = type(self).make_order(CAPACITY)
        self.model = type(self).make_model()

    @rule(path=st.sampled_from(PATHS))
    def use(self, path: list[int]) -> None:
        """Look a path up, touch what is there, and put the rest in, as a tier does."""
        held = [item for item in path if item in self.model.held]
        self.order.touch(held)
        self.model.touch(held)
        fresh = [item for item in path if item not in self.model.held]
        self.order.pin(held)
        for item in held:
            self.model.pins[item] = self.model.pins.get(item, 0) + 1
        room = True
        while room and len(self.model.held) + len(fresh) > CAPACITY:
            room = self.compare()
        self.order.unpin(held)
        for item in held:
            self.model.pins[item] -= 1
        if room and fresh:
            self.order.insert([(item, PARENT[item]) for item in fresh])
            self.model.insert(fresh)

    @rule()
    def evict(self) -> None:
        self.compare()

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        leaves = self.model.leaves()
        if leaves:
            item = data.draw(st.sampled_from(leaves))
            assert self.order.discard(item)
            self.model.drop(item)

    @precondition(lambda self: isinstance(self.model, NaivePriority) and self.model.held)
    @rule(data=st.data(), priority=st.integers(-1, 2))
    def prioritise(self, data: st.DataObject, priority: int) -> None:
        assert isinstance(self.order, PriorityOrder)
        assert isinstance(self.model, NaivePriority)
        item = data.draw(st.sampled_from(self.model.held))
        self.order.prioritise([(item, priority)])
        self.model.prioritise(item, priority)

    def compare(self) -> bool:
        expected = self.model.evict()
        assert self.order.evict() == expected
        return expected is not None

    @invariant()
    def agrees(self) -> None:
        self.order.check_integrity()
        assert len(self.order) == len(self.model.held)
        assert all(item in self.order for item in self.model.held)


MODELS: dict[str, tuple[Callable[[int], EvictionOrder], Callable[[], Naive]]] = {
    "arc": (ArcOrder, NaiveArc),
    "lineage": (LineageOrder, NaiveLineage),
    "lru": (LruOrder, NaiveLru),
    "priority": (PriorityOrder, NaivePriority),
    "multi-lru": (MultiLruOrder, NaiveMultiLru),
    "s3fifo": (S3FifoOrder, NaiveS3Fifo),
    # Without hints, sessions are all the same and the order is the plain one.
    "hinted": (lambda capacity: HintedOrder(capacity, clock=FakeClock()), NaiveLru),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_victim_is_the_naive_model_s(name: str) -> None:
    order, model = MODELS[name]
    members = {"make_order": staticmethod(order), "make_model": staticmethod(model)}
    case = type(f"OrderMachine_{name}", (OrderMachine,), members).TestCase
    case.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
    case("runTest").runTest()
