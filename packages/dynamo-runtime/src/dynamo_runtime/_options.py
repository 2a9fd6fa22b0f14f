"""How the options of a plane come about: its URL's query, a mapping that wins over it, a struct that checks both."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec

from dynamo_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)


def merged_options(url: str, options: Mapping[str, object]) -> tuple[dict[str, object], Metrics | None]:
    """Return a URL's query merged with ``options``, which win, and ``metrics`` among them, the scope to register in."""
    query = urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query, keep_blank_values=True)
    fields: dict[str, object] = {**dict(query), **options}
    return fields, cast("Metrics | None", fields.pop("metrics", None))


def checked_options(kind: type[OptionsT], fields: Mapping[str, object], whose: str) -> OptionsT:
    """Make a struct of options.

    Args:
        kind: The struct.
        fields: Options by name; values may be texts.
        whose: What they belong to, for messages.

    Raises:
        ConfigurationError: if an option is unknown or out of range.
    """
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join((*kind.__struct_fields__, "metrics"))
        raise ConfigurationError(f"{whose}: {error}; options are {known}") from error


def require_above_zero(options: msgspec.Struct, names: Iterable[str]) -> None:
    """Check that options are above 0.

    Raises:
        ConfigurationError: naming the first that is not.
    """
    for name in names:
        value = getattr(options, name)
        if not value > 0:
            raise ConfigurationError(f"{name} is {value}; give a number above 0", param=name)
