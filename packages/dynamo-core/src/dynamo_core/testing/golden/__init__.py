"""Golden files: one value of every wire type as msgpack and as JSON, written once per schema version, never edited.

A release that reads an older release's files reads that release's peers. ``python -m dynamo_core.testing.golden``
checks them all; with ``--write`` it adds files for schemas that have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dynamo_core.errors import BackendProtocolError
from dynamo_core.testing.golden._examples import EXAMPLES
from dynamo_core.wire import CODECS, Codec

FOLDER = Path(__file__).parent / "v1"


def missing(folder: Path = FOLDER) -> list[str]:
    """Return the schemas that have no golden files."""
    return [schema for schema in CODECS if not all(path.exists() for path in paths(schema, folder))]


def paths(schema: str, folder: Path = FOLDER) -> tuple[Path, Path]:
    """Return where a schema's msgpack and JSON files are."""
    return folder / f"{schema}.msgpack", folder / f"{schema}.json"


def write(folder: Path = FOLDER) -> list[str]:
    """Add files for schemas that have none; return those schemas. An existing file is never touched."""
    folder.mkdir(parents=True, exist_ok=True)
    added = missing(folder)
    for schema in added:
        binary, text = paths(schema, folder)
        value = EXAMPLES[schema]
        for path, content in ((binary, CODECS[schema].encode(value)), (text, render(value))):
            if not path.exists():
                path.write_bytes(content)
    return added


def render(value: Any) -> bytes:
    """Return a value as indented JSON, fields in their order; bytes are base64."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def check(schema: str, folder: Path = FOLDER) -> None:
    """Check that this release reads a schema's files to the expected value, and writes it back the same.

    Raises:
        BackendProtocolError: saying what differs.
    """
    codec: Codec[Any] = CODECS[schema]
    binary, text = (path.read_bytes() for path in paths(schema, folder))
    value = codec.decode(binary)
    expected = msgspec.json.decode(text, type=codec.kind)
    if value != expected:
        raise BackendProtocolError(f"{schema} reads as {value!r}, not as {expected!r}")
    if codec.decode(codec.encode(value)) != expected:
        raise BackendProtocolError(f"{schema} does not survive its own codec")
