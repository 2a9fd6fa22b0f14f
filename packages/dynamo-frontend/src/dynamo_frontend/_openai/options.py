"""From request fields to sampling, stop and output options, with the limits of the API."""

from __future__ import annotations

import random
from collections.abc import Collection
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GuidedDecoding, SamplingOptions, StopConditions
from dynamo_frontend._openai.fields import CommonFields
from dynamo_frontend._openai.hints import check_nvext

MAX_STOP_STRINGS = 4
MAX_STOP_TOKEN_IDS = 64
MAX_CHOICES = 128
_MAX_SEED = (1 << 63) - 1
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 2),
    "n": (1, MAX_CHOICES),
    "seed": (-(1 << 63), _MAX_SEED),
    "max_tokens": (1, 1 << 31),
    "max_completion_tokens": (1, 1 << 31),
    "min_tokens": (0, 1 << 31),
    "top_logprobs": (0, 20),
    "logprobs": (0, 20),
    "priority": (-(1 << 31), (1 << 31) - 1),
}
# Seeds must differ, they need not be secret; the system's randomness costs a call into the kernel for each.
_random = random.Random(random.SystemRandom().getrandbits(256))
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern")
_GUIDED_FIELDS: attrgetter[tuple[Any, ...]] = attrgetter(*_GUIDED)


def check_ranges(fields: CommonFields) -> None:
    """Refuse numbers out of the API's limits.

    Raises:
        InvalidRequestError: naming field, value and limits.
    """
    names, read = _ranged(type(fields))
    _check_numbers(names, read(fields))
    if fields.nvext is not None:
        check_nvext(fields.nvext)
    _check_rules(fields)


@cache
def _ranged(kind: type[CommonFields]) -> tuple[tuple[str, ...], attrgetter[tuple[Any, ...]]]:
    names = tuple(name for name in _RANGES if name in kind.__struct_fields__)
    return names, attrgetter(*names)


@lru_cache(maxsize=1024)
def _check_numbers(names: tuple[str, ...], values: tuple[Any, ...]) -> None:
    """Pass or raise; only what passes is remembered."""
    for name, value in zip(names, values, strict=True):
        if value is None or isinstance(value, bool):
            continue
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise InvalidRequestError(f"{name} is {value}; it must be from {low} to {high}.", param=name)


def _check_rules(fields: CommonFields) -> None:
    if fields.repetition_penalty == 0:
        raise InvalidRequestError("repetition_penalty is 0; it must be above 0.", param="repetition_penalty")
    if fields.top_p == 0:
        raise InvalidRequestError("top_p is 0; it must be above 0. For greedy output use temperature 0.", param="top_p")
    if fields.top_k is not None and fields.top_k < -1:
        raise InvalidRequestError(f"top_k is {fields.top_k}; it must be -1 (all tokens) or at least 1.", param="top_k")
    if fields.store:
        raise InvalidRequestError("store is true; nothing is stored here. Leave it out.", param="store")
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")


def sampling_options(
    fields: CommonFields, defaults: SamplingOptions, guided: GuidedDecoding | None = None
) -> SamplingOptions:
    """Return how tokens are drawn.

    A sampled request always gets a seed, so that it can continue on another worker with the same draws.
    """
    temperature = defaults.temperature if fields.temperature is None else fields.temperature
    seed = fields.seed
    if seed is None and temperature > 0:
        seed = _random.getrandbits(63)
    return SamplingOptions(
        temperature=temperature,
        top_p=defaults.top_p if fields.top_p is None else fields.top_p,
        top_k=defaults.top_k if fields.top_k is None else fields.top_k,
        min_p=fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=(
            defaults.repetition_penalty if fields.repetition_penalty is None else fields.repetition_penalty
        ),
        seed=seed,
        n=fields.n or 1,
        logit_bias=_logit_bias(fields.logit_bias),
        allowed_token_ids=_token_ids(fields.allowed_token_ids, "allowed_token_ids", limit=1 << 20),
        guided=guided,
    )


def stop_conditions(fields: CommonFields, max_tokens: int | None) -> StopConditions:
    """Return when a choice ends. Integers in ``stop`` are token ids."""
    given = [fields.stop] if isinstance(fields.stop, str) else (fields.stop or [])
    strings = tuple(item for item in given if isinstance(item, str))
    from_stop = [item for item in given if isinstance(item, int)]
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop has {len(strings)} strings; give at most {MAX_STOP_STRINGS}.", param="stop")
    if "" in strings:
        raise InvalidRequestError("stop has an empty string; remove it.", param="stop")
    ids = _token_ids([*(fields.stop_token_ids or []), *from_stop], "stop_token_ids", limit=MAX_STOP_TOKEN_IDS)
    min_tokens = fields.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {min_tokens} but at most {max_tokens} tokens may be generated; lower it.",
            param="min_tokens",
        )
    return StopConditions(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=strings,
        stop_token_ids=ids,
        ignore_eos=bool(fields.ignore_eos),
        max_thinking_tokens=fields.nvext.max_thinking_tokens if fields.nvext is not None else None,
    )


class OptionMemo:
    """Sampling options and stop conditions of one model that were made before: most requests ask for the same few.

    Args:
        defaults: The model's default sampling.
    """

    def __init__(self, defaults: SamplingOptions) -> None:
        self._defaults = defaults
        self._sampling: dict[tuple[Any, ...], SamplingOptions] = {}
        self._stops: dict[tuple[Any, ...], StopConditions] = {}

    def sampling(self, fields: CommonFields, guided: GuidedDecoding | None) -> SamplingOptions:
        """Return ``sampling_options`` of the fields."""
        if guided is not None or fields.logit_bias or fields.allowed_token_ids:
            return sampling_options(fields, self._defaults, guided)
        key = _SAMPLING_FIELDS(fields)
        found = self._sampling.get(key)
        if found is None:
            found = sampling_options(fields, self._defaults)
            _remember(self._sampling, key, found)
        elif fields.seed is None and found.seed is not None:
            found = msgspec.structs.replace(found, seed=_random.getrandbits(63))
        return found

    def stop(self, fields: CommonFields, max_tokens: int | None) -> StopConditions:
        """Return ``stop_conditions`` of the fields."""
        if fields.stop is not None or fields.stop_token_ids or fields.nvext is not None:
            return stop_conditions(fields, max_tokens)
        key = (max_tokens, fields.min_tokens, fields.ignore_eos)
        found = self._stops.get(key)
        if found is None:
            found = stop_conditions(fields, max_tokens)
            _remember(self._stops, key, found)
        return found


_SAMPLING_FIELDS: attrgetter[tuple[Any, ...]] = attrgetter(
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "n"
)
_MEMO_ENTRIES = 256


def _remember(memo: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    """Keep a value; a memo that is full starts anew."""
    if len(memo) >= _MEMO_ENTRIES:
        memo.clear()
    memo[key] = value


def guided_decoding(fields: CommonFields, capabilities: Collection[str]) -> GuidedDecoding | None:
    """Return the constraint on the output, if one is asked for.

    Raises:
        InvalidRequestError: if the model's engine cannot constrain its output, or two constraints are given.
    """
    given = [name for name, value in zip(_GUIDED, _GUIDED_FIELDS(fields), strict=True) if value is not None]
    given = [name for name in given if getattr(fields, name) != []]
    if not given:
        if fields.guided_decoding_backend is not None:
            raise InvalidRequestError(
                "guided_decoding_backend is given without a constraint; remove it.", param="guided_decoding_backend"
            )
        return None
    require_guided(capabilities, given[0])
    return GuidedDecoding(
        json=fields.guided_json,
        regex=fields.guided_regex,
        choice=tuple(fields.guided_choice or ()),
        grammar=fields.guided_grammar,
        whitespace_pattern=fields.guided_whitespace_pattern,
        backend=fields.guided_decoding_backend,
    )


def require_guided(capabilities: Collection[str], param: str) -> None:
    """Refuse a constraint that the engine would not apply."""
    if "guided_decoding" not in capabilities:
        raise InvalidRequestError(
            f"'{param}' needs guided decoding, which this model's engine does not offer. "
            "Remove the field or use another model.",
            param=param,
        )


def _token_ids(given: list[int] | None, name: str, *, limit: int) -> tuple[int, ...]:
    ids = tuple(given or ())
    if len(ids) > limit:
        raise InvalidRequestError(f"{name} has {len(ids)} entries; give at most {limit}.", param=name)
    for token in ids:
        if not 0 <= token < 1 << 32:
            raise InvalidRequestError(f"{name} has {token}, which is no token id.", param=name)
    return ids


def _logit_bias(given: dict[str, float] | None) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in (given or {}).items():
        if not key.isdigit():
            raise InvalidRequestError(f"logit_bias has the key {key!r}, which is no token id.", param="logit_bias")
        if not -100 <= value <= 100:
            raise InvalidRequestError(
                f"logit_bias of {key} is {value}; it must be from -100 to 100.", param="logit_bias"
            )
        found[int(key)] = value
    return found
