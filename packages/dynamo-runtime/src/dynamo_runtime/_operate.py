"""Commands for operators: who is there, what changes, and what does an endpoint answer."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import msgspec

from dynamo_core.clock import SystemClock
from dynamo_core.discovery import (
    INSTANCES_PREFIX,
    MODELS_PREFIX,
    Discovery,
    Instance,
    RecordDeleted,
    RecordPut,
    WatchEvent,
    WatchSynced,
)
from dynamo_core.errors import ConfigurationError, DynamoError, InvalidRequestError
from dynamo_core.ids import EndpointId, new_request_id, parse_instance_id
from dynamo_core.planes import CallOptions
from dynamo_core.settings import resolve_settings
from dynamo_core.streams import open_stream
from dynamo_core.wire import CODECS, INSTANCE, MODEL_RECORD
from dynamo_runtime._endpoints import pick_instance, readable_instances, require_instances
from dynamo_runtime._settings import OperatorSettings
from dynamo_runtime._substrate import open_discovery, open_request_plane, scheme_of


def instances(argv: list[str]) -> int:
    """``dynamo instances``: list who serves what."""
    settings, _ = _settings("dynamo instances", argv, "List the live instances, one a line.", positional=0)
    return _run(_list_instances(settings))


def watch(argv: list[str]) -> int:
    """``dynamo watch``: print each change of discovery until interrupted."""
    settings, _ = _settings("dynamo watch", argv, "Follow instances and models until Ctrl-C.", positional=0)
    return _run(_watch_all(settings))


def call(argv: list[str]) -> int:
    """``dynamo call ENDPOINT[@INSTANCE] JSON``: call an endpoint and print its items."""
    description = (
        "Call ENDPOINT (namespace.component.endpoint, with @INSTANCE for a certain one) with a JSON payload, or - for "
        "stdin. The payload is encoded as the endpoint's declared type; each item is printed as one JSON line."
    )
    settings, (endpoint, text) = _settings("dynamo call", argv, description, positional=2)
    payload = sys.stdin.read() if text == "-" else text
    return _run(_call_endpoint(settings, endpoint, payload))


def _settings(prog: str, argv: list[str], description: str, *, positional: int) -> tuple[OperatorSettings, list[str]]:
    resolved = resolve_settings(prog, (OperatorSettings,), argv, allow_extra_args=True, description=description)
    extra = resolved.extra_args
    flags = [argument for argument in extra if argument.startswith("--")]
    if flags:
        raise ConfigurationError(f"flag {flags[0]!r} is not known to {prog}; see {prog} --help")
    if len(extra) != positional:
        raise ConfigurationError(f"{prog} takes {positional} arguments, not {len(extra)}; see {prog} --help")
    return resolved.get(OperatorSettings), extra


def _run(command: Coroutine[Any, Any, None]) -> int:
    with suppress(KeyboardInterrupt, BrokenPipeError):
        asyncio.run(command)
    return 0


@asynccontextmanager
async def _discovery(settings: OperatorSettings) -> AsyncGenerator[Discovery]:
    discovery = open_discovery(settings.discovery, SystemClock())
    try:
        await discovery.start()
        yield discovery
    finally:
        await discovery.close()


async def _list_instances(settings: OperatorSettings) -> None:
    async with _discovery(settings) as discovery:
        records = await discovery.list(INSTANCES_PREFIX)
    found = readable_instances(records)
    shown = [instance for instance in found if settings.namespace in ("", instance.endpoint.namespace)]
    if settings.json_lines:
        for instance in shown:
            _print(msgspec.json.encode(instance).decode())
        return
    width = max((len(str(instance.endpoint)) for instance in shown), default=0)
    for instance in shown:
        _print(f"{instance.endpoint!s:<{width}}  {_describe(instance)}")
    if not shown:
        print(f"no instances in {settings.discovery}", file=sys.stderr)  # noqa: T201 - for the operator


async def _watch_all(settings: OperatorSettings) -> None:
    async with _discovery(settings) as discovery:
        async for event in discovery.watch(""):
            line = _change(event, settings)
            if line:
                _print(line)


def _change(event: WatchEvent, settings: OperatorSettings) -> str:
    if isinstance(event, WatchSynced):
        change = {"event": "synced", "revision": event.revision, "resync": event.resync}
        return json.dumps(change) if settings.json_lines else f"= synced at revision {event.revision}"
    parts = event.key.split("/")
    if settings.namespace and settings.namespace not in parts[2:3]:
        return ""
    if settings.json_lines:
        return json.dumps({"event": "put" if isinstance(event, RecordPut) else "deleted", "key": event.key})
    if isinstance(event, RecordDeleted):
        return f"- {event.key}"
    return f"+ {event.key}  {_value(event)}"


def _value(event: RecordPut) -> str:
    try:
        if event.key.startswith(INSTANCES_PREFIX):
            return _describe(INSTANCE.decode(event.value))
        if event.key.startswith(MODELS_PREFIX):
            return f"model {MODEL_RECORD.decode(event.value).card.name}"
    except DynamoError as error:
        return error.message
    return f"{len(event.value)} bytes"


def _describe(instance: Instance) -> str:
    facts = " ".join(f"{name}={value}" for name, value in sorted(instance.metadata.items()))
    return f"{instance.instance_id:x}  {instance.address}  {facts}".rstrip()


async def _call_endpoint(settings: OperatorSettings, target: str, text: str) -> None:
    name, _, wanted = target.partition("@")
    endpoint, instance_id = EndpointId.parse(name), parse_instance_id(wanted) if wanted else None
    async with _discovery(settings) as discovery:
        found = await require_instances(discovery, endpoint)
        instance = pick_instance(found, instance_id)
        plane = open_request_plane(settings.request_plane or _plane_url(instance.address), SystemClock())
        try:
            await plane.start()
            options = CallOptions(
                request_id=new_request_id(), deadline_s=settings.timeout_s, schema=instance.types.request
            )
            payload = encode_payload(instance, text)
            async with await open_stream(plane, instance.address, endpoint, payload, options) as stream:
                async for item in stream:
                    _print(show_item(instance, item))
        finally:
            await plane.close()


def encode_payload(instance: Instance, text: str) -> bytes:
    """Return JSON text as the endpoint's request type; as it is if the type is unknown here.

    Raises:
        InvalidRequestError: if it is not JSON, or not of that type.
    """
    codec = CODECS.get(instance.types.request)
    try:
        if codec is None:
            json.loads(text)
            return text.encode()
        return codec.encode(msgspec.json.decode(text, type=codec.kind))
    except (ValueError, msgspec.MsgspecError) as error:
        wanted = instance.types.request or "JSON"
        raise InvalidRequestError(f"payload is not {wanted}: {error}") from error


def show_item(instance: Instance, item: bytes) -> str:
    """Return an item as one line of JSON; bytes that are neither JSON nor msgpack as a JSON string."""
    codec = CODECS.get(instance.types.response)
    if codec is not None:
        return msgspec.json.encode(codec.decode(item)).decode()
    for decode in (msgspec.json.decode, msgspec.msgpack.decode):
        try:
            return msgspec.json.encode(decode(item)).decode()
        except (msgspec.MsgspecError, ValueError):
            continue
    return json.dumps(item.decode("utf-8", "backslashreplace"))


def _plane_url(address: str) -> str:
    """Return a URL for a plane that only opens calls to this address."""
    scheme = scheme_of(address)
    if scheme == "unix":
        return f"unix://{PurePosixPath(urlsplit(address).path).parent}"
    return "tcp://127.0.0.1:0" if scheme == "tcp" else address


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the output of the command
