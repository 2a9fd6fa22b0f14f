"""Safetensors reader: three dtypes, shards, and files that lie."""

import json
from pathlib import Path

import numpy as np
import pytest
from parts import write_safetensors

from dynamo_core.errors import ConfigurationError
from dynamo_worker._reference._safetensors import SafetensorsFolder

TENSOR = np.array([[1.0, -2.5, 0.0], [3.25, 1e-3, -0.125]], dtype=np.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 1e-2)])
def test_each_dtype_reads_as_float32(tmp_path: Path, dtype: str, tolerance: float) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": TENSOR}, dtype)
    found = SafetensorsFolder(tmp_path).read("a", (2, 3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, TENSOR, rtol=tolerance)


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": TENSOR})
    write_safetensors(tmp_path / "two.safetensors", {"b": TENSOR * 2})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = SafetensorsFolder(tmp_path)
    np.testing.assert_array_equal(folder.read("b", (2, 3)), TENSOR * 2)
    assert "a" in folder
    assert "c" not in folder


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--model .* neither model\.safetensors nor"):
        SafetensorsFolder(tmp_path)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ConfigurationError, match=r"gone\.safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": []}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigurationError, match="not a safetensors index"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        b"\x04" + b"\0" * 7 + b"nope",
    ],
)
def test_a_broken_file_is_refused_by_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_a_missing_tensor_a_wrong_shape_and_a_strange_dtype_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": TENSOR})
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(ConfigurationError, match="tensor 'b' is missing"):
        folder.read("b", (2, 3))
    with pytest.raises(ConfigurationError, match=r"shape \(2, 3\), config\.json asks for \(3, 2\)"):
        folder.read("a", (3, 2))
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"I64"'))
    with pytest.raises(ConfigurationError, match="dtype I64"):
        SafetensorsFolder(tmp_path).read("a", (2, 3))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": TENSOR})
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(ConfigurationError, match="lies outside the file"):
        SafetensorsFolder(tmp_path).read("a", (2, 3))
