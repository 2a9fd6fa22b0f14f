"""A made workload: conversations that grow turn by turn behind a few shared system prompts, in a closed loop."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from dynamo_core.tokens import chain_hashes, pack_hashes
from dynamo_router._lab_trace import TraceRequest


class SessionShape(msgspec.Struct, frozen=True):
    """Size of the workload.

    Attributes:
        sessions: Conversations.
        turns: Requests of each.
        system_prompts: Distinct system prompts; session n has number n modulo this.
        system_tokens: Tokens of a system prompt.
        turn_tokens: Tokens a user adds each turn.
        output_tokens: Tokens of an answer.
        concurrency: Requests in flight at all times.
    """

    sessions: int = 64
    turns: int = 6
    system_prompts: int = 8
    system_tokens: int = 1413
    turn_tokens: int = 353
    output_tokens: int = 16
    concurrency: int = 32


class Sessions:
    """Closed loop: a request's end starts the next turn of a random session that waits.

    Args:
        shape: Size.
        block_size: Tokens a block.
        seed: Seed of the order.
    """

    def __init__(self, shape: SessionShape, *, block_size: int, seed: int) -> None:
        self._shape = shape
        self._block_size = block_size
        self._rng = random.Random(seed)
        self._ready = list(range(shape.sessions))
        self._turns = [0] * shape.sessions
        self._session_of: dict[str, int] = {}

    def first(self) -> Sequence[TraceRequest]:
        """Return as many requests as may be in flight."""
        return [self._next(0.0) for _ in range(min(self._shape.concurrency, len(self._ready)))]

    def after(self, finished: TraceRequest, now_s: float) -> Sequence[TraceRequest]:
        """Return the next request, if any session has turns left."""
        session = self._session_of.pop(finished.name)
        if self._turns[session] < self._shape.turns:
            self._ready.append(session)
        return [self._next(now_s)] if self._ready else ()

    def _next(self, now_s: float) -> TraceRequest:
        session = self._ready.pop(self._rng.randrange(len(self._ready)))
        turn = self._turns[session]
        self._turns[session] += 1
        shape, size = self._shape, self._block_size
        tokens = shape.system_tokens + shape.turn_tokens * (turn + 1) + shape.output_tokens * turn
        shared = shape.system_tokens // size
        prompt = (session % shape.system_prompts + 1) << 48
        own = (session + 1) << 32
        local = [(prompt if block < shared else own) | block for block in range(tokens // size)]
        name = f"{session}/{turn}"
        self._session_of[name] = session
        return TraceRequest(
            now_s, tokens, shape.output_tokens, pack_hashes(local), pack_hashes(chain_hashes(local)), name
        )
