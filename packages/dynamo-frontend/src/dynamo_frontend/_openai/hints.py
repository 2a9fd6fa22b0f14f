"""What a request says to the router and of its future: the ``nvext`` object, and headers, which win over the body."""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeVar

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import parse_instance_id
from dynamo_core.kv import BlockHints
from dynamo_core.requests import RoutingHints

N = TypeVar("N", int, float)

_REFUSED = {
    "annotations": "its values come as headers and usage",
    "extra_fields": "worker and receipt come as the headers x-dynamo-worker-id and x-dynamo-decision-id",
    "greed_sampling": "set temperature to 0",
    "metadata_upload": "nothing is uploaded",
    "token_data": "send token ids as the prompt of /v1/completions",
    "use_raw_prompt": "send the prompt to /v1/completions",
}
_SESSION_HEADERS = ("x-dynamo-session-id", "x-session-id", "x-claude-code-session-id", "thread-id")
_FUTURE_HEADERS = frozenset({"x-dynamo-next-turn-s", "x-dynamo-retain-s", "x-dynamo-session-final"})
_HEADERS = frozenset(
    {
        *_SESSION_HEADERS,
        *_FUTURE_HEADERS,
        "x-dynamo-dp-rank",
        "x-dynamo-meta-policy-class",
        "x-dynamo-prefill-dp-rank",
        "x-dynamo-prefill-instance-id",
        "x-dynamo-request-priority",
        "x-dynamo-worker-instance-id",
        "x-tenant-id",
    }
)
TIMEOUT_HEADER = "x-dynamo-timeout-s"
_PRIORITIES = (-(1 << 31), (1 << 31) - 1)
_LONGEST_S = 30 * 24 * 3600.0
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class AgentHints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent knows of its request.

    Attributes:
        priority: Higher goes first.
        osl: Output tokens to expect.
        session_final: Whether no later turn follows this one.
        next_turn_s: Seconds from this turn's start until the next one is expected.
        retain_s: Seconds for which its cached blocks are worth keeping.
    """

    priority: int | None = None
    osl: int | None = None
    session_final: bool | None = None
    next_turn_s: float | None = None
    retain_s: float | None = None


class NvExt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Extension object of a request.

    Attributes:
        backend_instance_id: Worker to use.
        decode_worker_id: The same, by its name where prefill and decode are apart.
        prefill_worker_id: Worker for the prompt.
        dp_rank: Rank of the worker.
        prefill_dp_rank: Rank of the prompt's worker.
        cache_salt: Separates cached prefixes.
        max_thinking_tokens: Most tokens of reasoning.
        agent_hints: What an agent knows.
    """

    backend_instance_id: int | None = None
    decode_worker_id: int | None = None
    prefill_worker_id: int | None = None
    dp_rank: int | None = None
    prefill_dp_rank: int | None = None
    cache_salt: str | None = None
    max_thinking_tokens: int | None = None
    agent_hints: AgentHints | None = None
    annotations: Any = None
    extra_fields: Any = None
    greed_sampling: Any = None
    metadata_upload: Any = None
    token_data: Any = None
    use_raw_prompt: Any = None


class HintedFields(Protocol):
    """Fields of a request that are hints, or stand in for some."""

    @property
    def nvext(self) -> NvExt | None:
        """The extension object."""
        ...

    @property
    def cache_salt(self) -> str | None:
        """Separates cached prefixes."""
        ...

    @property
    def prompt_cache_key(self) -> str | None:
        """Names a conversation."""
        ...

    @property
    def priority(self) -> int | None:
        """Higher goes first."""
        ...


_NONE = NvExt()
_NO_FUTURE = BlockHints()
_NO_HINTS = AgentHints()


def check_nvext(extension: NvExt) -> None:
    """Refuse what is not offered, and numbers out of their limits.

    Raises:
        InvalidRequestError: naming the field and what to do instead.
    """
    for name, remedy in _REFUSED.items():
        if getattr(extension, name):
            raise InvalidRequestError(
                f"Field 'nvext.{name}' is not supported: {remedy}. Remove it.", param=f"nvext.{name}"
            )
    hints = extension.agent_hints or _NO_HINTS
    numbers: dict[str, tuple[float | None, float, float]] = {
        "agent_hints.priority": (hints.priority, *_PRIORITIES),
        "agent_hints.osl": (hints.osl, 1, 1 << 31),
        "agent_hints.next_turn_s": (hints.next_turn_s, 0, _LONGEST_S),
        "agent_hints.retain_s": (hints.retain_s, 0, _LONGEST_S),
        "max_thinking_tokens": (extension.max_thinking_tokens, 0, 1 << 31),
        "dp_rank": (extension.dp_rank, 0, 1 << 31),
        "prefill_dp_rank": (extension.prefill_dp_rank, 0, 1 << 31),
    }
    for name, (value, low, high) in numbers.items():
        if value is not None and not low <= value <= high:
            raise InvalidRequestError(
                f"nvext.{name} is {value}; it must be from {low} to {high}.", param=f"nvext.{name}"
            )


def routing_hints(fields: HintedFields, headers: dict[str, str]) -> RoutingHints:
    """Return what the caller asks of the router.

    Raises:
        InvalidRequestError: naming the header that is no number or instance id.
    """
    if fields.nvext is None and _HEADERS.isdisjoint(headers):
        # Most requests: nothing to weigh against each other.
        session = fields.prompt_cache_key or ""
        return RoutingHints(cache_salt=fields.cache_salt or "", session_id=session, priority=fields.priority or 0)
    extension = fields.nvext or _NONE
    hints = extension.agent_hints or _NO_HINTS
    named = extension.backend_instance_id
    instance = _first(_instance(headers, "x-dynamo-worker-instance-id"), named, extension.decode_worker_id)
    prefill = _first(_instance(headers, "x-dynamo-prefill-instance-id"), extension.prefill_worker_id)
    priority = _first(_integer(headers, "x-dynamo-request-priority"), hints.priority, fields.priority)
    tenant = headers.get("x-tenant-id", "")
    return RoutingHints(
        cache_salt=tenant or extension.cache_salt or fields.cache_salt or "",
        session_id=_session(headers) or fields.prompt_cache_key or "",
        priority=priority or 0,
        expected_output_tokens=hints.osl,
        instance_id=instance,
        dp_rank=_first(_integer(headers, "x-dynamo-dp-rank"), extension.dp_rank),
        prefill_instance_id=prefill,
        prefill_dp_rank=_first(_integer(headers, "x-dynamo-prefill-dp-rank"), extension.prefill_dp_rank),
        policy_class=headers.get("x-dynamo-meta-policy-class", ""),
        tenant=tenant,
    )


def block_hints(fields: HintedFields, headers: dict[str, str], routing: RoutingHints) -> BlockHints | None:
    """Return what the caller says of the future of its cached blocks; None if it says nothing.

    Args:
        fields: The request.
        headers: Its headers.
        routing: What it asks of the router: a priority holds for blocks too, and a tenant's blocks count to it.

    Raises:
        InvalidRequestError: naming the header that is no number of seconds, or neither true nor false.
    """
    named = fields.nvext is not None or not _FUTURE_HEADERS.isdisjoint(headers)
    if not named and not routing.priority and not routing.tenant:
        return None
    hints = (fields.nvext or _NONE).agent_hints or _NO_HINTS
    final = _flag(headers, "x-dynamo-session-final")
    found = BlockHints(
        session_ended=bool(hints.session_final if final is None else final),
        next_turn_s=_first(_seconds(headers, "x-dynamo-next-turn-s"), hints.next_turn_s),
        priority=routing.priority,
        retain_s=_first(_seconds(headers, "x-dynamo-retain-s"), hints.retain_s),
        tenant=routing.tenant,
    )
    if found.session_ended and found.next_turn_s is not None:
        raise InvalidRequestError(
            "The session is said to end with this turn, and a next turn to follow it; leave one out.",
            param="nvext.agent_hints.session_final" if final is None else "x-dynamo-session-final",
        )
    return found if found != _NO_FUTURE else None


def time_limit_s(headers: dict[str, str], most_s: float | None) -> float | None:
    """Return the seconds that a request may take: what it asks for, but no more than ``most_s``; None for no limit.

    Raises:
        InvalidRequestError: if the header is no number of seconds.
    """
    asked = _seconds(headers, TIMEOUT_HEADER, 0.001)
    if asked is None or most_s is None:
        return asked or most_s
    return min(asked, most_s)


def _session(headers: dict[str, str]) -> str:
    for name in _SESSION_HEADERS:
        if headers.get(name):
            return headers[name]
    return ""


def _first(*values: N | None) -> N | None:
    return next((value for value in values if value is not None), None)


def _seconds(headers: dict[str, str], name: str, least_s: float = 0.0) -> float | None:
    text = headers.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least_s <= value <= _LONGEST_S:
        raise InvalidRequestError(
            f"Header {name} is {text[:100]!r}; it must be seconds from {least_s:g} to {_LONGEST_S:.0f}.", param=name
        )
    return value


def _flag(headers: dict[str, str], name: str) -> bool | None:
    text = headers.get(name)
    if not text:
        return None
    found = _FLAGS.get(text.lower())
    if found is None:
        raise InvalidRequestError(f"Header {name} is {text[:100]!r}; it must be true or false.", param=name)
    return found


def _integer(headers: dict[str, str], name: str) -> int | None:
    text = headers.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise InvalidRequestError(f"Header {name} is {text!r}; it must be a whole number.", param=name) from None


def _instance(headers: dict[str, str], name: str) -> int | None:
    text = headers.get(name)
    return int(parse_instance_id(text)) if text else None
