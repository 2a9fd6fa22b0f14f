"""Where the two workers of a prompt meet while it is computed: the bootstrap form of a hand-off."""

from __future__ import annotations

import asyncio
from typing import Any

from dynamo_core.errors import BackendProtocolError
from dynamo_core.requests import GenerateRequest, PrefillResult
from dynamo_worker._metrics import WorkerMetrics

BOOTSTRAP_KIND = "dynamo.kv_bootstrap.v1"
BOOTSTRAP_HEADER = "x-dynamo-kv-bootstrap"


class Room:
    """One prompt.

    Attributes:
        entered: Set once the prompt's request is here.
        is_over: Whether nothing more of it is computed.
        is_served: Whether its receiver has got all it will get, so that nothing need be kept for it.
    """

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.is_over = False
        self.is_served = False


class Rooms:
    """Rooms of one prefill worker. There are at most as many as requests and transfers run at once.

    Args:
        metrics: Where counts go.

    Attributes:
        changed: Set, and replaced, when blocks or rooms have changed: take it before you look, then wait for it.
    """

    def __init__(self, metrics: WorkerMetrics) -> None:
        self.changed = asyncio.Event()
        self._rooms: dict[str, Room] = {}
        self._metrics = metrics

    def notify(self) -> None:
        """Wake those who wait for blocks."""
        self.changed.set()
        self.changed = asyncio.Event()

    def enter(self, name: str) -> Room:
        """The prompt's request is here: let its receiver in.

        Raises:
            BackendProtocolError: if another request is in that room.
        """
        room = self.join(name)
        if room.entered.is_set():
            raise BackendProtocolError(f"room {name!r} is taken by another prompt; give every request one of its own")
        room.entered.set()
        return room

    def join(self, name: str) -> Room:
        """Return the room, whoever comes first."""
        room = self._rooms.setdefault(name, Room())
        self._metrics.kv_rooms.set(len(self._rooms))
        return room

    def leave(self, name: str, room: Room) -> None:
        """Forget a room that one of its two has left for good; the other one keeps what it has of it."""
        if self._rooms.get(name) is room:
            del self._rooms[name]
            self._metrics.kv_rooms.set(len(self._rooms))
            self.notify()


def bootstrap_to(room: str) -> PrefillResult:
    """Return what a prefill request carries in ``handoff`` for its blocks to be sent while they are computed."""
    return PrefillResult({"kind": BOOTSTRAP_KIND, "room": room})


def bootstrap_room(request: GenerateRequest) -> str | None:
    """Return the room that a prefill request names; None for the pull form.

    Raises:
        BackendProtocolError: if it names none although it asks for one.
    """
    if request.handoff is None or request.handoff.parameters.get("kind") != BOOTSTRAP_KIND:
        return None
    room: Any = request.handoff.parameters.get("room")
    if not isinstance(room, str) or not room:
        raise BackendProtocolError(f"the bootstrap names the room {room!r}; give a text that no other request has")
    return room
