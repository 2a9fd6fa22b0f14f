"""A small image encoder: patches, one layer of attention between them, one vector for the image.

Its weights are drawn from a fixed seed, so every worker has the same ones and the same image gives the same bits; it
was never trained, so what the model makes of an image means nothing. It is there for the encode role to have real work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from dynamo_core.content import ContentPart
from dynamo_core.enums import PartKind
from dynamo_core.errors import InvalidRequestError
from dynamo_worker._media import content_hash, token_index
from dynamo_worker._reference._png import read_png
from dynamo_worker._reference._uniforms import uniforms

EMBEDDING = "image_embedding"
MAX_IMAGES = 16
_F32_BYTES = 4
_SEED = 20
_SIDE, _PATCH, _WIDTH = 32, 8, 64
_PATCHES = (_SIDE // _PATCH) ** 2

Floats = npt.NDArray[np.float32]
Rows = tuple[tuple[int, Floats], ...]


class ImageEncoder:
    """Turns an image into one vector, which is added to the embedding of the prompt token that the image belongs to.

    Args:
        hidden_size: Length of the vector.
        scale: Its root mean square; that of the model's token embeddings.
    """

    def __init__(self, hidden_size: int, scale: float) -> None:
        self._scale = np.float32(scale)
        self._patch = _weights(0, _PATCH * _PATCH * 3, _WIDTH)
        self._place = _weights(1, _PATCHES, _WIDTH)
        self._query, self._key, self._value = (_weights(matrix, _WIDTH, _WIDTH) for matrix in (2, 3, 4))
        self._out = _weights(5, _WIDTH, hidden_size)

    def encode(self, part: ContentPart) -> ContentPart:
        """Return the part that stands for an image: its vector, at the same place and under the same hash.

        Raises:
            InvalidRequestError: if it is no image that can be read.
        """
        if part.kind is PartKind.TENSOR and part.name == EMBEDDING:
            return self._checked(part)
        if part.kind is not PartKind.IMAGE or not part.data:
            raise InvalidRequestError(
                f"parts has a part of kind {part.kind.value!r} with {len(part.data)} bytes; "
                "send images inline, as a frontend with --media-urls fetch does",
                param="parts",
            )
        vector = self._vector(read_png(part.data))
        return msgspec.structs.replace(
            part,
            kind=PartKind.TENSOR,
            data=vector.astype("<f4").tobytes(),
            shape=(len(vector),),
            dtype="f32",
            name=EMBEDDING,
            media_type="",
            content_hash=content_hash(part),
        )

    def _checked(self, part: ContentPart) -> ContentPart:
        width = self._out.shape[1]
        if part.shape != (width,) or part.dtype != "f32" or len(part.data) != _F32_BYTES * width:
            raise InvalidRequestError(
                f"an {EMBEDDING} has shape {part.shape}, dtype {part.dtype!r} and {len(part.data)} bytes; this model "
                f"takes shape ({width},) of 'f32': use encode workers of the same model",
                param="parts",
            )
        return part

    def _vector(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        small = _shrink(pixels).reshape(_SIDE // _PATCH, _PATCH, _SIDE // _PATCH, _PATCH, 3)
        patches = small.swapaxes(1, 2).reshape(_PATCHES, -1) @ self._patch + self._place
        scores = (patches @ self._query) @ (patches @ self._key).T / np.float32(math.sqrt(_WIDTH))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = patches + (weights / weights.sum(axis=-1, keepdims=True)) @ (patches @ self._value)
        vector: Floats = mixed.mean(axis=0) @ self._out
        return vector / np.float32(math.sqrt(float((vector * vector).mean())) or 1.0) * self._scale


def embedding_rows(parts: Sequence[ContentPart], prompt_tokens: int) -> Rows:
    """Return which prompt token gets which vector.

    Raises:
        InvalidRequestError: if a part belongs to no token of the prompt.
    """
    rows: list[tuple[int, Floats]] = []
    for part in parts:
        index = token_index(part)
        if index >= prompt_tokens:
            raise InvalidRequestError(
                f"an image belongs to token {index}, the prompt has {prompt_tokens} tokens", param="parts"
            )
        rows.append((index, np.frombuffer(part.data, dtype="<f4").astype(np.float32)))
    return tuple(rows)


def _weights(matrix: int, height: int, width: int) -> Floats:
    count = height * width
    seeds, matrices = np.full(count, _SEED, dtype=np.uint64), np.full(count, matrix, dtype=np.uint64)
    drawn = uniforms(seeds, matrices, np.arange(count, dtype=np.uint64)).reshape(height, width) - 0.5
    return (drawn * math.sqrt(12 / height)).astype(np.float32)


def _shrink(pixels: npt.NDArray[np.uint8]) -> Floats:
    """Return ``[side, side, 3]`` in -1 to 1: means over areas of a large image, nearest pixels of a small one."""
    values: Floats = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    for axis in (0, 1):
        edges = np.arange(_SIDE) * values.shape[axis] // _SIDE
        stops = np.maximum((np.arange(_SIDE) + 1) * values.shape[axis] // _SIDE, edges + 1)
        sums = np.concatenate((np.zeros_like(values.take([0], axis)), values.cumsum(axis, dtype=np.float32)), axis)
        sizes = (stops - edges).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        values = (sums.take(stops, axis) - sums.take(edges, axis)) / sizes
    return values
