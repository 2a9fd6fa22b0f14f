"""Frames survive any cutting; any other bytes are a typed error and nothing else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.errors import BackendProtocolError
from dynamo_runtime._plane.framing import (
    MAGIC,
    PREFACE,
    Batch,
    Cancel,
    Frame,
    FrameReader,
    Grant,
    Hello,
    Open,
    Ping,
    encode,
)

LIMIT = 4096
FRAMES: list[Frame] = [
    Hello(LIMIT),
    Open(1, "a.b.c", b"payload", 8, "r", 1.5, {"traceparent": "x"}, "s"),
    Batch([1, 2], [[b"a", b"b"], [b""]], [1], []),
    Grant([1], [5]),
    Cancel(2, True),
    Ping(),
]
STREAM = PREFACE + b"".join(encode(frame) for frame in FRAMES)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_frames_survive_any_cutting(cuts: list[int]) -> None:
    reader = FrameReader(LIMIT)
    bounds = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[start:end] for start, end in itertools.pairwise(bounds)]
    found = [frame for piece in pieces for frame in reader.feed(piece)]
    assert found == FRAMES
    assert reader.buffered_bytes == 0


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans(), st.integers(1, 64))
def test_other_bytes_are_a_typed_error_or_wait(data: bytes, greet: bool, size: int) -> None:
    reader = FrameReader(LIMIT)
    stream = (PREFACE if greet else b"") + data
    try:
        for start in range(0, len(stream), size):
            list(reader.feed(stream[start : start + size]))
    except BackendProtocolError:
        return
    assert reader.buffered_bytes <= LIMIT + 4


@settings(max_examples=300)
@given(st.sampled_from(FRAMES), st.data())
def test_damaged_frames_are_a_typed_error_or_a_frame(frame: Frame, data: st.DataObject) -> None:
    body = bytearray(encode(frame))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(4, len(body) - 1))] = data.draw(st.integers(0, 255))
    reader = FrameReader(LIMIT)
    try:
        assert len(list(reader.feed(PREFACE + bytes(body)))) == 1
    except BackendProtocolError:
        return


def test_frame_over_the_limit_is_refused_by_its_length_alone() -> None:
    reader = FrameReader(LIMIT)
    with pytest.raises(BackendProtocolError, match="exceeds max_frame_bytes 4096"):
        list(reader.feed(PREFACE + (LIMIT + 1).to_bytes(4, "big")))


def test_other_version_names_both() -> None:
    with pytest.raises(BackendProtocolError, match="speaks version 9 of the request plane, this process 1"):
        list(FrameReader(LIMIT).feed(MAGIC + bytes((9, 0))))


def test_http_is_refused_on_its_first_bytes() -> None:
    with pytest.raises(BackendProtocolError, match="another protocol"):
        list(FrameReader(LIMIT).feed(b"GET"))


def test_deep_nesting_is_a_typed_error() -> None:
    body = b"\x91" * 3000
    with pytest.raises(BackendProtocolError):
        list(FrameReader(LIMIT).feed(PREFACE + len(body).to_bytes(4, "big") + body))
