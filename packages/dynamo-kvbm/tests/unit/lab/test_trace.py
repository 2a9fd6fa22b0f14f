from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_kvbm._lab.trace import TraceRequest, read_trace

LINES = b'{"timestamp": 2000, "input_length": 700, "hash_ids": [0, 1]}\n\n{"timestamp": 1000, "hash_ids": [0]}\n'


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_requests_come_in_order_of_arrival(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    assert read_trace(path) == [TraceRequest(1.0, (0,), 512), TraceRequest(2.0, (0, 1), 700)]
    assert read_trace(path, limit=1) == [TraceRequest(2.0, (0, 1), 700)]


@pytest.mark.parametrize("line", ["{", '{"timestamp": 1}', '{"hash_ids": ["a"]}', "[]"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n' + line)
    with pytest.raises(InvalidRequestError, match=r"trace.jsonl:2 is no request"):
        read_trace(path)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_trace(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigurationError, match="holds no request"):
        read_trace(tmp_path / "empty")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(LINES)[:-12])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_trace(tmp_path / "cut.gz")
