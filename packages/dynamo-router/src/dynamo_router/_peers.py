"""Warm start of a selection service: workers and indexes of the first peer that answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec
import structlog

from dynamo_core.errors import DynamoError
from dynamo_router._service_bodies import WorkerBody
from dynamo_router._snapshot import IndexSnapshot

PEER_TIMEOUT_S = 30.0
_log = structlog.get_logger(__name__)


class PeerState(msgspec.Struct, frozen=True):
    """What a peer knows.

    Attributes:
        workers: Its workers.
        indexes: Its indexes by ``model:group``.
    """

    workers: tuple[WorkerBody, ...]
    indexes: dict[str, IndexSnapshot]


async def fetch_peer(peers: Sequence[str]) -> PeerState | None:
    """Return the state of the first peer that answers in full, or None if none does."""
    timeout = aiohttp.ClientTimeout(total=PEER_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for peer in peers:
            try:
                indexes = msgspec.json.decode(await _get(session, peer, "dump"), type=dict[str, IndexSnapshot])
                records: list[dict[str, Any]] = msgspec.json.decode(await _get(session, peer, "workers"))
                workers = tuple(msgspec.convert(_given(record), WorkerBody, strict=False) for record in records)
                return PeerState(workers, indexes)
            except (TimeoutError, aiohttp.ClientError, msgspec.MsgspecError, ValueError, DynamoError) as error:
                _log.warning("peer_not_read", peer=peer, error=repr(error))
    return None


def _given(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name in WorkerBody.__struct_fields__}


async def _get(session: aiohttp.ClientSession, peer: str, path: str) -> bytes:
    async with session.get(f"{peer.rstrip('/')}/{path}") as response:
        response.raise_for_status()
        return await response.read()
