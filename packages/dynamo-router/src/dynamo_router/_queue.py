"""Requests that wait because every worker they may go to is busy.

Requests wait in classes. Within a class an order decides; between classes, weighted deficit round robin shares out
uncached tokens: each visit of a class whose head cannot be paid adds its quantum once. A request pinned to a busy
worker waits in a lane of its own and holds up nobody else.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from dynamo_core.errors import CapacityExhaustedError, ConfigurationError, InvalidRequestError

T = TypeVar("T")
Order = Literal["fcfs", "lcfs", "wspt", "vtc", "edf"]
DEFAULT_CLASS = "default"
MAX_TENANTS = 10_000


class ClassOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One class of requests.

    Attributes:
        quantum_tokens: Uncached tokens a round; shares between classes are as their quanta.
        order: ``fcfs`` by arrival, ``lcfs`` latest first, ``wspt`` least uncached tokens per weight first, ``vtc`` the
            tenant served least so far first, ``edf`` earliest deadline first and those without one last; a higher
            priority goes before all of these.
        max_requests: Most that wait; the next is refused.
    """

    quantum_tokens: Annotated[int, msgspec.Meta(ge=1)] = 8192
    order: Order = "fcfs"
    max_requests: Annotated[int, msgspec.Meta(ge=0)] = 1024


class Waiting(Generic[T]):
    """One waiting request.

    Attributes:
        item: What the owner waits with.
        cost: Uncached tokens when it came, at least 1.
        prompt_tokens: Length of its prompt.
        priority: Higher goes first.
        tenant: Whose it is.
        lane: Worker it is pinned to, or None.
        deadline_s: Monotonic time by which it must have a worker; infinite without one.
        gone: Whether it left without being served.
    """

    __slots__ = ("cost", "deadline_s", "gone", "item", "lane", "priority", "prompt_tokens", "tenant")

    def __init__(  # noqa: PLR0913 - keyword-only facts of one request
        self,
        item: T,
        *,
        cost: int,
        prompt_tokens: int = 0,
        priority: int = 0,
        tenant: str = "",
        lane: object = None,
        deadline_s: float = math.inf,
    ) -> None:
        self.item = item
        self.cost = max(cost, 1)
        self.prompt_tokens = prompt_tokens
        self.priority = priority
        self.tenant = tenant
        self.lane = lane
        self.deadline_s = deadline_s
        self.gone = False


class FairQueue(Generic[T]):
    """All waiting requests.

    Args:
        classes: Classes by name; ``default`` exists always and takes requests that name none.
    """

    def __init__(self, classes: Mapping[str, ClassOptions] | None = None) -> None:
        named = {DEFAULT_CLASS: ClassOptions(), **(classes or {})}
        self._classes = {name: _Class[T](options) for name, options in named.items()}
        self._ring = list(self._classes.values())
        self._cursor = 0

    def __len__(self) -> int:
        return sum(len(each) for each in self._ring)

    def waiting(self) -> Iterator[Waiting[T]]:
        """Iterate over all that wait, in no order."""
        for each in self._ring:
            yield from each.waiting()

    def push(self, name: str, entry: Waiting[T]) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: if there is no such class.
            CapacityExhaustedError: if the class is full.
        """
        found = self._classes.get(name or DEFAULT_CLASS)
        if found is None:
            raise InvalidRequestError(
                f"policy class {name!r} is not one of {', '.join(sorted(self._classes))}; name one of them or none",
                param="routing.policy_class",
            )
        if len(found) >= found.options.max_requests:
            raise CapacityExhaustedError(
                f"all workers are busy and {len(found)} requests wait in class {name or DEFAULT_CLASS!r}, its limit; "
                "retry later",
                reason="capacity.queue_full",
                retry_after_s=1.0,
            )
        found.push(entry)

    def discard(self, entry: Waiting[T]) -> None:
        """Drop a request that does not want to wait any more. Idempotent."""
        if not entry.gone:
            entry.gone = True
            for each in self._ring:
                each.note_gone(entry)

    def pop(self, can_go: Callable[[Waiting[T]], bool]) -> Waiting[T] | None:
        """Take out the next request that can go, or return None if none can."""
        chosen = self._scan(can_go)
        if chosen is not None:
            return chosen
        heads = [(each, head) for each in self._ring if (head := each.head(can_go)) is not None]
        if not heads:
            return None
        # Nobody could be paid in a whole round: grant at once the rounds after which the first one can.
        rounds = min(math.ceil((head.cost - each.deficit) / each.options.quantum_tokens) for each, head in heads)
        for each, _ in heads:
            each.deficit += rounds * each.options.quantum_tokens
        return self._scan(can_go, grant=False)

    def charge(self, tenant: str, tokens: float) -> None:
        """Add served tokens to a tenant's account, which ``vtc`` orders by."""
        for each in self._ring:
            each.charge(tenant, tokens)

    def _scan(self, can_go: Callable[[Waiting[T]], bool], *, grant: bool = True) -> Waiting[T] | None:
        for _ in range(len(self._ring)):
            each = self._ring[self._cursor]
            head = each.head(can_go)
            if head is None:
                if not len(each):
                    each.deficit = 0
            else:
                if grant and each.deficit < head.cost:
                    each.deficit += each.options.quantum_tokens
                if each.deficit >= head.cost:
                    return self._serve(each, head, can_go)
            self._cursor = (self._cursor + 1) % len(self._ring)
        return None

    def _serve(self, each: _Class[T], head: Waiting[T], can_go: Callable[[Waiting[T]], bool]) -> Waiting[T]:
        each.take(head)
        each.deficit -= head.cost
        following = each.head(can_go)
        if not len(each):
            each.deficit = 0
        if following is None or following.cost > each.deficit:
            self._cursor = (self._cursor + 1) % len(self._ring)
        return head


class _Class(Generic[T]):
    """The requests of one class, in lanes."""

    def __init__(self, options: ClassOptions) -> None:
        self.options = options
        self.deficit = 0
        self._size = 0
        self._numbers = itertools.count()
        # Lane -> heap of (key, number, request). Requests that left stay until they reach the top.
        self._lanes: dict[object, list[tuple[tuple[float, ...], int, Waiting[T]]]] = {}
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return self._size

    def waiting(self) -> Iterator[Waiting[T]]:
        for lane in self._lanes.values():
            yield from (entry for _, _, entry in lane if not entry.gone)

    def push(self, entry: Waiting[T]) -> None:
        number = next(self._numbers)
        if self.options.order == "vtc":
            self._lift(entry.tenant)
        heapq.heappush(self._lanes.setdefault(entry.lane, []), (self._key(entry, number), number, entry))
        self._size += 1

    def head(self, can_go: Callable[[Waiting[T]], bool]) -> Waiting[T] | None:
        tops = [top for lane in list(self._lanes) if (top := self._top(lane)) is not None]
        for _, _, entry in sorted(tops, key=lambda top: top[:2]):
            if can_go(entry):
                return entry
        return None

    def take(self, entry: Waiting[T]) -> None:
        lane = self._lanes[entry.lane]
        position = next(place for place, top in enumerate(lane) if top[2] is entry)
        lane[position] = lane[-1]
        lane.pop()
        heapq.heapify(lane)
        self._size -= 1

    def note_gone(self, entry: Waiting[T]) -> None:
        if any(top[2] is entry for top in self._lanes.get(entry.lane, ())):
            self.take(entry)

    def charge(self, tenant: str, tokens: float) -> None:
        if self.options.order == "vtc":
            self._served[tenant] = self._served.get(tenant, 0.0) + tokens
            if len(self._served) > MAX_TENANTS:
                del self._served[min(self._served, key=self._served.__getitem__)]

    def _key(self, entry: Waiting[T], number: int) -> tuple[float, ...]:
        order = self.options.order
        if order == "lcfs":
            return (-entry.priority, -number)
        if order == "wspt":
            return (-(1 + max(entry.priority, 0)) / entry.cost, number)
        if order == "edf":
            return (-entry.priority, entry.deadline_s, number)
        return (-entry.priority, number)

    def _top(self, lane: object) -> tuple[tuple[float, ...], int, Waiting[T]] | None:
        heap = self._lanes[lane]
        if not heap:
            del self._lanes[lane]
            return None
        if self.options.order != "vtc":
            return heap[0]
        # Accounts change while requests wait, so the order is worked out when it is needed.
        return min(heap, key=lambda top: (top[0][0], self._served.get(top[2].tenant, 0.0), top[1]))

    def _lift(self, tenant: str) -> None:
        # A tenant that was away gets no credit for it: it begins level with the least served one that waits.
        active = {entry.tenant for entry in self.waiting()}
        if tenant not in active:
            level = min((self._served.get(other, 0.0) for other in active), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), level)


def read_classes(options: Mapping[str, Any]) -> dict[str, ClassOptions]:
    """Read classes from settings.

    Raises:
        ConfigurationError: for an unknown option or a value out of range.
    """
    try:
        return msgspec.convert(dict(options), dict[str, ClassOptions], strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"queue_classes: {error}; give {{name: {{quantum_tokens, order, ...}}}}") from error
