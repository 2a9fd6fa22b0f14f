"""Message classes of the protocol, made from its ``.proto`` text when the gRPC server starts.

Descriptors live in a pool of their own: a client library in the same process brings the same names in the default one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

_COMMENT = re.compile(r"//[^\n]*")
_RPC = re.compile(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);")
_MESSAGE = re.compile(r"message (\w+) \{((?:[^{}]|oneof \w+ \{[^{}]*\})*)\}")
_FIELD = re.compile(r"(repeated )?(?:map<string, (\w+)>|(\w+)) (\w+) = (\d+);")
_ONEOF = re.compile(r"oneof (\w+) \{([^{}]*)\}")
_SCALARS = {
    "double": 1,
    "float": 2,
    "int64": 3,
    "uint64": 4,
    "int32": 5,
    "bool": 8,
    "string": 9,
    "bytes": 12,
    "uint32": 13,
}
"""Numbers of the scalar types in protobuf's own descriptors."""
_MESSAGE_TYPE = 11
_OPTIONAL, _REPEATED = 1, 3


@dataclass(frozen=True, slots=True)
class Method:
    """One call of the service."""

    name: str
    request: str
    response: str
    streams: bool


class Schema:
    """Messages by name, and the service's calls.

    Raises:
        ImportError: if protobuf is not installed.
    """

    package = "inference"
    service = "GRPCInferenceService"

    def __init__(self) -> None:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

        text = _COMMENT.sub("", (resources.files(__package__ or "") / "open_inference.proto").read_text())
        file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=self.package, syntax="proto3")
        names = [_add_message(file, name, body) for name, body in _MESSAGE.findall(text)]
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._messages: dict[str, Any] = {
            name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{self.package}.{name}"))
            for name in names
        }
        self.methods = [
            Method(name, request, response, bool(streams)) for name, streams, request, _, response in _RPC.findall(text)
        ]

    def __getattr__(self, name: str) -> Any:
        try:
            return self._messages[name]
        except KeyError:
            raise AttributeError(f"the protocol has no message {name!r}") from None


def _add_message(file: Any, name: str, body: str) -> str:
    message: Any = file.message_type.add(name=name)
    for oneof, inner in _ONEOF.findall(body):
        message.oneof_decl.add(name=oneof)
        for field in _fields(inner):
            _add_field(message, field).oneof_index = len(message.oneof_decl) - 1
    for field in _fields(_ONEOF.sub("", body)):
        _add_field(message, field)
    return name


def _fields(body: str) -> Iterator[tuple[str, str, str, str, str]]:
    yield from _FIELD.findall(body)


def _add_field(message: Any, field: tuple[str, str, str, str, str]) -> Any:
    repeated, mapped, kind, name, number = field
    label = _REPEATED if repeated or mapped else _OPTIONAL
    added = message.field.add(name=name, number=int(number), label=label)
    if mapped:
        # On the wire a map is a list of entries, each with a key and a value.
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_OPTIONAL, type=_SCALARS["string"])
        entry.field.add(name="value", number=2, label=_OPTIONAL, type=_MESSAGE_TYPE, type_name=f".inference.{mapped}")
        added.type = _MESSAGE_TYPE
        added.type_name = f".inference.{message.name}.{entry.name}"
    elif kind in _SCALARS:
        added.type = _SCALARS[kind]
    else:
        added.type = _MESSAGE_TYPE
        added.type_name = f".inference.{kind}"
    return added
