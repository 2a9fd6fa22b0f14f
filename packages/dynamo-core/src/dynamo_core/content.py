"""Typed content parts: how anything but plain token ids enters and leaves an engine.

One flat record serves every kind, so a part of a kind that this release does not know still decodes (as
``PartKind.UNKNOWN``) and can be passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from dynamo_core.enums import PartKind
from dynamo_core.errors import InvalidRequestError
from dynamo_core.tokens import PackedTokens

_DTYPE_BYTES = {
    "f64": 8,
    "i64": 8,
    "f32": 4,
    "i32": 4,
    "u32": 4,
    "f16": 2,
    "bf16": 2,
    "i8": 1,
    "u8": 1,
    "bool": 1,
}


class ContentPart(msgspec.Struct, frozen=True, omit_defaults=True):
    """One piece of content.

    Attributes:
        kind: Which of the fields below matter.
        text: The text of a text part.
        data: Raw bytes: packed tokens, an encoded image, a little-endian tensor.
        url: Where the bytes are, if they are not inline.
        media_type: IANA media type of ``data`` or of what ``url`` gives.
        shape: Shape of a tensor, row-major.
        dtype: Element type of a tensor: f64, f32, f16, bf16, i64, i32, u32, i8, u8 or bool.
        score: Score of a rerank result.
        index: Which input item this output belongs to.
        content_hash: 64-bit hash of the content; it takes part in block hashes, so equal media share KV blocks.
        name: Name of a tensor or document.
        metadata: Free fields for the engine.
    """

    kind: PartKind
    text: str = ""
    data: bytes = b""
    url: str = ""
    media_type: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    score: float | None = None
    index: int = 0
    content_hash: int | None = None
    name: str = ""
    metadata: dict[str, Any] = {}  # msgspec copies an empty literal default for each instance


def text_part(text: str) -> ContentPart:
    """Return a text part."""
    return ContentPart(PartKind.TEXT, text=text)


def tokens_part(packed: PackedTokens, *, index: int = 0) -> ContentPart:
    """Return a part of packed token ids."""
    return ContentPart(PartKind.TOKENS, data=packed, index=index)


def tensor_part(data: bytes, *, shape: Sequence[int], dtype: str, name: str = "", index: int = 0) -> ContentPart:
    """Return a tensor part.

    Args:
        data: Little-endian, row-major bytes.
        shape: Sizes of the axes.
        dtype: Element type.
        name: Name of the tensor.
        index: Input item this belongs to.

    Raises:
        InvalidRequestError: if the dtype is unknown, a size is negative, or the byte count does not fit the shape.
    """
    width = _DTYPE_BYTES.get(dtype)
    if width is None:
        raise InvalidRequestError(f"tensor dtype {dtype!r} is not one of {', '.join(_DTYPE_BYTES)}", param="dtype")
    expected = width
    for size in shape:
        if size < 0:
            raise InvalidRequestError(f"tensor shape {tuple(shape)} has a size below 0", param="shape")
        expected *= size
    if expected != len(data):
        raise InvalidRequestError(
            f"tensor of shape {tuple(shape)} and dtype {dtype} needs {expected} bytes, got {len(data)}",
            param="data",
        )
    return ContentPart(PartKind.TENSOR, data=data, shape=tuple(shape), dtype=dtype, name=name, index=index)
