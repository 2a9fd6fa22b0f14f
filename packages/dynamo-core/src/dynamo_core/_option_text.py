"""Options as text: what a flag or a variable says, by the type of the option."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

from pydantic.fields import FieldInfo

from dynamo_core.errors import ConfigurationError


def parse_flag(value: Any, info: FieldInfo, flag: str) -> Any:
    """The value of a flag; a repeated one is a list."""
    if isinstance(value, list):
        items = typing.cast("list[str]", value)
        return [part for item in items for part in _split(item, flag)]
    return parse_text(value, info, flag) if isinstance(value, str) else value


def parse_text(text: str, info: FieldInfo, where: str) -> Any:
    """The value of one text, for pydantic to judge."""
    if is_list(info.annotation):
        return _split(text, where)
    if any(typing.get_origin(kind) is dict or kind is dict for kind in plain_types(info.annotation)):
        return _json(text, where)
    return text


def _split(text: str, where: str) -> list[Any]:
    if text.lstrip().startswith("["):
        return typing.cast("list[Any]", _json(text, where))
    return [part.strip() for part in text.split(",") if part.strip()]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{where}: {text!r} is not JSON: {error}") from error


def plain_types(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def is_list(annotation: Any) -> bool:
    """Whether the option takes several values."""
    return any(typing.get_origin(kind) in (list, tuple) for kind in plain_types(annotation))
