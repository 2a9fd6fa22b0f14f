from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockDescriptor, BlockLayout
from dynamo_core.noop.kv import DictBlockStore
from dynamo_kvbm._codecs import BlockCodec, CodecName, make_codec
from dynamo_kvbm._tiers.encoded import EncodedStore

LAYOUT = BlockLayout(num_layers=2, block_size=2, kv_heads=2, head_dim=8)
LOSSLESS = [CodecName.NONE, CodecName.LZ4, CodecName.ZSTD]
LOSSY = [CodecName.INT8, CodecName.FP8]


def numbers(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(LAYOUT.shape).astype(np.float32)


@pytest.mark.parametrize("name", LOSSLESS)
@given(data=st.binary(min_size=LAYOUT.block_bytes, max_size=LAYOUT.block_bytes))
@settings(max_examples=30, deadline=None)
def test_lossless_codecs_give_back_the_same_bytes(name: CodecName, data: bytes) -> None:
    codec = make_codec(name, LAYOUT)
    assert bytes(codec.decode(codec.encode(memoryview(data)))) == data


@pytest.mark.parametrize("name", [CodecName.LZ4, CodecName.ZSTD])
def test_what_repeats_shrinks(name: CodecName) -> None:
    codec = make_codec(name, LAYOUT)
    assert len(codec.encode(bytes(LAYOUT.block_bytes))) < LAYOUT.block_bytes / 4


@pytest.mark.parametrize("name", LOSSY)
@given(
    values=hnp.arrays(
        np.float32, LAYOUT.shape, elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
    )
)
@settings(max_examples=100, deadline=None)
def test_quantised_blocks_keep_to_the_stated_bound(name: CodecName, values: np.ndarray) -> None:
    codec = make_codec(name, LAYOUT)
    stored = codec.encode(values.tobytes())
    assert len(stored) == codec.stored_bytes
    assert len(stored) < LAYOUT.block_bytes
    found = np.frombuffer(codec.decode(stored), np.float32).reshape(LAYOUT.shape)
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    bound = largest / 254 if name is CodecName.INT8 else np.maximum(np.abs(exact) / 16, largest / 458752)
    # Scale and product are rounded to f32, whose smallest normal number is 1.2e-38.
    assert np.all(np.abs(found - exact) <= bound * (1 + 1e-5) + largest * 1e-6 + 1e-36)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_two_byte_floats_are_quantised_too(name: CodecName, dtype: str) -> None:
    layout = BlockLayout(2, 2, 2, 8, dtype=dtype)
    exact = numbers()
    data = (
        exact.astype(np.float16).tobytes()
        if dtype == "f16"
        else (exact.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    )
    codec = make_codec(name, layout)
    again = codec.decode(codec.encode(data))
    assert len(again) == layout.block_bytes
    # What was quantised once stays as it is, up to the rounding of the element type.
    third = codec.decode(codec.encode(again))
    assert np.mean(np.frombuffer(third, np.uint16) == np.frombuffer(again, np.uint16)) > 0.9


@pytest.mark.parametrize("name", list(CodecName))
def test_what_was_not_encoded_is_refused(name: CodecName) -> None:
    codec = make_codec(name, LAYOUT)
    assert isinstance(codec, BlockCodec)
    with pytest.raises(ValueError, match=r"no .*block"):
        codec.decode(b"nonsense")


def test_quantising_integers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="takes f32, f16 or bf16, not i8"):
        make_codec(CodecName.INT8, BlockLayout(1, 1, 1, 1, dtype="i8"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'dynamo-kvbm\[compression\]'"):
        make_codec(CodecName.ZSTD, LAYOUT)


def test_a_stored_block_that_cannot_be_decoded_is_a_miss_and_leaves() -> None:
    inner = DictBlockStore(4, tier=Tier.EXTERNAL)
    store = EncodedStore(inner, make_codec(CodecName.ZSTD, LAYOUT), LAYOUT.block_bytes)
    inner.put([BlockDescriptor(1)], [b"nonsense"])
    store.put([BlockDescriptor(2)], [numbers().tobytes()])
    assert store.get([1, 2]) == [None, numbers().tobytes()]
    assert store.contains([1, 2]) == [False, True]
