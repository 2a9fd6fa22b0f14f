"""What a request through the gateway costs its caller in tokens, as far as bytes that pass by show it."""

from __future__ import annotations

import re

import msgspec

from dynamo_frontend._http.request import CallerLimits, HttpRequest

_BYTES_PER_TOKEN = 4
_UNSAID_OUTPUT_TOKENS = 256
_TAIL_BYTES = 4096
_TOTAL = re.compile(rb'"total_tokens"\s*:\s*(\d+)')
_PARTS = re.compile(rb'"(?:input|output)_tokens"\s*:\s*(\d+)')


class _Budget(msgspec.Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None


_BUDGET = msgspec.json.Decoder(_Budget)


class Charge:
    """Tokens of one request: reserved by an estimate, settled by the engine's own count where it gives one.

    Args:
        caller: Whose limits.
        prompt_tokens: Estimate of the prompt.
        reserved: What was set aside.
    """

    def __init__(self, caller: CallerLimits, prompt_tokens: int, reserved: int) -> None:
        self._caller = caller
        self._prompt_tokens = prompt_tokens
        self._reserved = reserved
        self._events = 0
        self._tail = b""
        self._settled = False

    @classmethod
    def of(cls, request: HttpRequest) -> Charge | None:
        """Reserve a request's tokens; None if its caller's are not counted.

        Raises:
            RateLimitedError: if they are not left in this minute.
        """
        caller = request.caller
        if caller is None or not caller.counts_tokens:
            return None
        prompt = len(request.body) // _BYTES_PER_TOKEN
        reserved = prompt + _output_tokens(request.body)
        caller.reserve(reserved)
        return cls(caller, prompt, reserved)

    def feed(self, data: bytes) -> None:
        """See a piece of the reply pass."""
        self._events += data.count(b"data: ")
        self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def settle(self, *, answered: bool) -> None:
        """Replace what was set aside by what was used: nothing if the engine refused. Idempotent."""
        if not self._settled:
            self._settled = True
            self._caller.settle(self._reserved, self._used() if answered else 0)

    def _used(self) -> int:
        totals = _TOTAL.findall(self._tail)
        if totals:
            return int(totals[-1])
        parts = _PARTS.findall(self._tail)
        return sum(map(int, parts[-2:])) if parts else self._prompt_tokens + self._events


def _output_tokens(body: bytes) -> int:
    try:
        budget = _BUDGET.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _UNSAID_OUTPUT_TOKENS
    given = budget.max_completion_tokens or budget.max_output_tokens or budget.max_tokens or _UNSAID_OUTPUT_TOKENS
    return max(0, given) * max(1, budget.n or 1)
