"""Media as requests carry it: by URL, inline, or as a data URL."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from dynamo_core.enums import Modality, PartKind
from dynamo_core.errors import InvalidRequestError, UnsupportedMediaError

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
_KINDS: dict[str, tuple[PartKind, str]] = {
    "image_url": (PartKind.IMAGE, "image_url"),
    "input_image": (PartKind.IMAGE, "image_url"),
    "audio_url": (PartKind.AUDIO, "audio_url"),
    "input_audio": (PartKind.AUDIO, "input_audio"),
    "video_url": (PartKind.VIDEO, "video_url"),
}
"""Kind of a part, and the field that holds its content, by the part's type."""
_MODALITIES = {
    PartKind.IMAGE: Modality.IMAGE,
    PartKind.AUDIO: Modality.AUDIO,
    PartKind.VIDEO: Modality.VIDEO,
}


class PlacedPart(dict[str, Any]):
    """A part that another API's request was translated to, with its place there."""

    where = ""


@dataclass(frozen=True, slots=True)
class MediaRef:
    """One item of media.

    Attributes:
        kind: What it is.
        where: Field it came in.
        url: Where its bytes are; empty if they are inline.
        encoded: Inline bytes in base64.
        media_type: IANA type of inline bytes.
        detail: How closely the caller wants an image looked at.
    """

    kind: PartKind
    where: str
    url: str = ""
    encoded: str = ""
    media_type: str = ""
    detail: str = ""

    def decode(self, max_bytes: int) -> bytes:
        """Return the inline bytes.

        Raises:
            InvalidRequestError: if they are no base64, or too many.
        """
        if len(self.encoded) > (max_bytes + 2) * 4 // 3 + 4:
            raise too_large(self.where, max_bytes)
        try:
            data = base64.b64decode(self.encoded, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequestError(f"The content of {self.where} is not valid base64.", param=self.where) from None
        if not data:
            raise InvalidRequestError(f"The content of {self.where} is empty.", param=self.where)
        return data


class MediaCollector:
    """Gathers the media of a conversation in the order of its placeholders.

    Args:
        modalities: What the model takes.
        max_items: Most items of one request.
    """

    def __init__(self, modalities: Collection[Modality], max_items: int) -> None:
        self._modalities = modalities
        self._max_items = max_items
        self.refs: list[MediaRef] = []

    def add(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Take a part; return what stands for it in the template.

        Raises:
            UnsupportedMediaError: if the model does not take this kind.
            InvalidRequestError: naming the field that is wrong.
        """
        where = part.where if isinstance(part, PlacedPart) else where
        kind, field = _KINDS.get(str(part.get("type")), (PartKind.UNKNOWN, ""))
        if _MODALITIES.get(kind) not in self._modalities:
            raise UnsupportedMediaError(
                f"{where} has type {part.get('type')!r}, which this model does not take; send text.", param=where
            )
        if len(self.refs) >= self._max_items:
            raise InvalidRequestError(
                f"The request has more than {self._max_items} images, sounds and films; send fewer.", param=where
            )
        self.refs.append(_reference(kind, part, field, where))
        return {"type": kind.value}


def _reference(kind: PartKind, part: Mapping[str, Any], field: str, where: str) -> MediaRef:
    content = part.get(field)
    where = f"{where}.{field}"
    fields = cast("dict[str, Any]", content) if isinstance(content, dict) else {"url": content, **_detail(part)}
    if field == "input_audio":
        return MediaRef(kind, where, encoded=_word(fields, "data", where), media_type=f"audio/{_format(fields, where)}")
    url, detail = _word(fields, "url", where), fields.get("detail") or ""
    if detail not in ("", "auto", "low", "high"):
        raise InvalidRequestError(f"{where}.detail is {detail!r}; use auto, low or high.", param=f"{where}.detail")
    if url[:5].lower() != "data:":
        return MediaRef(kind, where, url=url, detail=detail)
    match = _DATA_URL.match(url)
    if match is None:
        raise InvalidRequestError(
            f"The data URL of {where} must have the form data:<type>;base64,<content>.", param=where
        )
    check_type(kind, match["type"], where)
    return MediaRef(kind, where, encoded=url[match.end() :], media_type=match["type"].lower(), detail=detail)


def check_type(kind: PartKind, media_type: str, where: str) -> None:
    """Refuse content of another kind than its part says.

    Raises:
        UnsupportedMediaError: naming the type.
    """
    if not media_type.lower().startswith(f"{kind.value}/"):
        raise UnsupportedMediaError(
            f"The content of {where} is {media_type[:100]!r}; send {kind.value} content.", param=where
        )


def too_large(where: str, max_bytes: int) -> InvalidRequestError:
    """Return the refusal of an item that is too large."""
    return InvalidRequestError(
        f"The content of {where} is larger than {max_bytes} bytes; send a smaller one.",
        reason="request.media_too_large",
        param=where,
    )


def _detail(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"detail": part.get("detail")}


def _format(fields: Mapping[str, Any], where: str) -> str:
    name = _word(fields, "format", where)
    if not re.fullmatch(r"[\w.+-]{1,20}", name, re.ASCII):
        raise InvalidRequestError(f"{where}.format is no audio format, such as wav or mp3.", param=f"{where}.format")
    return name


def _word(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{where}.{name} must be text.", param=f"{where}.{name}")
    return value
