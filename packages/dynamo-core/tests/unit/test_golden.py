"""Golden files are read to their expected value, and nothing edits them."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo_core.errors import BackendProtocolError
from dynamo_core.testing import golden
from dynamo_core.testing.golden.__main__ import main
from dynamo_core.testing.golden._examples import EXAMPLES
from dynamo_core.wire import CODECS


@pytest.mark.parametrize("schema", CODECS)
def test_golden_file_reads_as_expected(schema: str) -> None:
    golden.check(schema)


@pytest.mark.parametrize("schema", CODECS)
def test_golden_file_is_written_the_same_today(schema: str) -> None:
    binary, text = golden.paths(schema)
    codec: Any = CODECS[schema]
    value = codec.decode(binary.read_bytes())
    assert value == EXAMPLES[schema]
    assert _plain(codec.encode(value)) == _plain(binary.read_bytes())
    assert golden.render(value) == text.read_bytes()


def _plain(payload: bytes) -> bytes:
    # A map's header is as wide as the type has fields, given or not: with a sixteenth field it takes two bytes more,
    # which every reader understands. All else must be the same, the order of the fields too.
    return msgspec.msgpack.encode(msgspec.msgpack.decode(payload))


# Optional fields that came after the file was written, which nothing edits; each has a round trip in a test of its own.
LATER_FIELDS = {("dynamo.generate_request.v1", "block_hints")}


@pytest.mark.parametrize("schema", CODECS)
def test_example_leaves_no_field_at_its_default(schema: str) -> None:
    value = EXAMPLES[schema]
    for field in msgspec.structs.fields(value):
        if (schema, field.name) in LATER_FIELDS:
            assert getattr(value, field.name) == field.default, field.name
        elif field.default is not msgspec.NODEFAULT:
            assert getattr(value, field.name) != field.default, field.name
        elif field.default_factory is not msgspec.NODEFAULT:
            assert getattr(value, field.name) != field.default_factory(), field.name


def test_no_golden_file_is_without_a_schema() -> None:
    names = {path.name.removesuffix(path.suffix) for path in golden.FOLDER.iterdir()}
    assert names == CODECS.keys() == EXAMPLES.keys()


def test_write_adds_what_is_missing_and_touches_nothing_else(tmp_path: Path) -> None:
    assert golden.write(tmp_path) == list(CODECS)
    binary, text = golden.paths("dynamo.error.v1", tmp_path)
    binary.write_bytes(b"edited")
    text.unlink()
    assert golden.write(tmp_path) == ["dynamo.error.v1"]
    assert binary.read_bytes() == b"edited"
    assert text.exists()
    assert golden.write(tmp_path) == []


def test_check_tells_a_changed_meaning(tmp_path: Path) -> None:
    golden.write(tmp_path)
    _, text = golden.paths("dynamo.kv_event_query.v1", tmp_path)
    text.write_text(text.read_text().replace('"first": 7', '"first": 6'))
    with pytest.raises(BackendProtocolError, match="reads as"):
        golden.check("dynamo.kv_event_query.v1", tmp_path)


def test_command_is_content_with_the_shipped_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().err == ""
