"""The decode role: brings the prompt's blocks from a prefill worker, before the engine goes on from there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.discovery import Instance
from dynamo_core.errors import DeadlineExceededError, DynamoError, UnavailableError
from dynamo_core.kv import BlockDescriptor
from dynamo_core.requests import GenerateRequest
from dynamo_core.tokens import token_count
from dynamo_worker._deadline import within
from dynamo_worker._disagg.handoff import KvHandoff, SupportsKvHandoff, prompt_blocks
from dynamo_worker._disagg.peers import Peers
from dynamo_worker._disagg.pull import BlockPuller
from dynamo_worker._disagg.rooms import bootstrap_to
from dynamo_worker._metrics import WorkerMetrics

_ATTEMPTS = 2

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DecodeOptions:
    """How prompts come from elsewhere.

    Attributes:
        threshold_tokens: Uncached prompt tokens from which a prefill worker is asked; None never asks.
        timeout_s: Longest wait for a prompt from elsewhere, its transfer included.
        local_prefill: Whether the prompt is computed here if it cannot come from elsewhere.
        bootstrap: Whether blocks are fetched while the prefill worker computes, instead of afterwards.
    """

    threshold_tokens: int | None
    timeout_s: float
    local_prefill: bool
    bootstrap: bool = False


class RemotePrompt:
    """The preparation of a decode worker's requests.

    Args:
        blocks: The engine's blocks.
        model: Served model name.
        peers: Prefill workers, for requests without a hand-off.
        puller: Brings blocks.
        options: When and how long.
        clock: Time.
        metrics: Where counts go.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        blocks: SupportsKvHandoff,
        *,
        model: str,
        peers: Peers,
        puller: BlockPuller,
        options: DecodeOptions,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        self._blocks = blocks
        self._block_size = blocks.block_access().layout.block_size
        self._model = model
        self._peers = peers
        self._puller = puller
        self._options = options
        self._clock = clock
        self._metrics = metrics

    def concerns(self, request: GenerateRequest) -> bool:
        """Whether the prompt may come from elsewhere."""
        if request.handoff is not None:
            return True
        threshold = self._options.threshold_tokens
        return threshold is not None and token_count(request.token_ids) >= max(threshold, self._block_size + 1)

    async def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """Get the prompt's blocks here; return the request without a hand-off.

        Raises:
            DynamoError: if they cannot come and the prompt must not be computed here.
        """
        outcome = "remote"
        try:
            limit_s = self._options.timeout_s
            if request.deadline_s is not None:
                limit_s = min(limit_s, request.deadline_s)
            outcome = await within(self._clock, limit_s, self._bring(request, limit_s))
        except TimeoutError:
            outcome = "timeout"
            if not self._options.local_prefill:
                raise DeadlineExceededError(
                    f"The prompt did not come from a prefill worker within {self._options.timeout_s} s.",
                    reason="backend.prefill_timeout",
                ) from None
        except DynamoError as error:
            outcome = "failed"
            if not self._options.local_prefill:
                raise
            log.info("prompt is computed here", request_id=request.request_id, reason=error.reason, why=error.message)
        finally:
            self._metrics.remote_prefills.labels(outcome=outcome).inc()
        return msgspec.structs.replace(request, handoff=None)

    async def _bring(self, request: GenerateRequest, limit_s: float) -> str:
        blocks = prompt_blocks(request, self._block_size)
        if request.handoff is not None:
            await self._puller.pull(KvHandoff.from_result(request.handoff), blocks)
            return "handed_over"
        held = await self._blocks.match_blocks([block.sequence_hash for block in blocks])
        uncached = token_count(request.token_ids) - held * self._block_size
        if uncached < (self._options.threshold_tokens or 0):
            return "short"
        return await self._bring_from_peers(request, blocks, limit_s)

    async def _bring_from_peers(
        self, request: GenerateRequest, blocks: Sequence[BlockDescriptor], limit_s: float
    ) -> str:
        tried: set[int] = set()
        for attempt in range(_ATTEMPTS):
            instance = self._peers.choose(self._model, self._block_size, excluded=frozenset(tried))
            if instance is None:
                break
            tried.add(instance.instance_id)
            try:
                handoff = await self._have_computed(instance, request, blocks, limit_s)
            except UnavailableError:
                if attempt + 1 == _ATTEMPTS:
                    raise
            else:
                if handoff is not None:
                    await self._puller.pull(handoff, blocks)
                return "remote"
        if self._options.local_prefill:
            return "no_peer"
        raise UnavailableError(
            f"No prefill worker serves {self._model} at {self._peers.endpoint}.", reason="backend.worker_unavailable"
        )

    async def _have_computed(
        self, instance: Instance, request: GenerateRequest, blocks: Sequence[BlockDescriptor], limit_s: float
    ) -> KvHandoff | None:
        """Have the prompt computed; return where its blocks are left to be pulled, None if they are here already."""
        place = self._peers.meeting_place(instance) if self._options.bootstrap else None
        if place is None:
            return KvHandoff.from_result(await self._peers.prefill(instance, request, deadline_s=limit_s))
        room = secrets.token_hex(8)
        meeting = msgspec.structs.replace(place, lease_id=room, bootstrap=True)
        asked = msgspec.structs.replace(request, handoff=bootstrap_to(room))
        both: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._peers.prefill(instance, asked, deadline_s=limit_s)),
            asyncio.ensure_future(self._puller.pull(meeting, blocks)),
        ]
        try:
            await asyncio.gather(*both)
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        return None
