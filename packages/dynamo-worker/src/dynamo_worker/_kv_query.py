"""Answers KV event queries: how a router that missed events, or has just come, learns what a worker holds."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_core.errors import BackendProtocolError, InvalidRequestError, NotFoundError
from dynamo_core.events import KvEventQuery
from dynamo_core.ids import InstanceId, format_instance_id
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.wire import KV_EVENT_BATCH, KV_EVENT_QUERY
from dynamo_worker._kv_publisher import KvPublisher


class KvQueryHandler:
    """The request handler of the ``worker_kv_indexer_query`` endpoint.

    Args:
        instance_id: Whose blocks these are.
        publishers: Publisher of each dp rank.
    """

    def __init__(self, instance_id: InstanceId, publishers: Mapping[int, KvPublisher]) -> None:
        self._instance_id = instance_id
        self._publishers = publishers

    async def __call__(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        """Answer with one ``KvEventBatch``.

        Raises:
            NotFoundError: if the query is for another worker or an unknown dp rank.
        """
        query = _decode(payload)
        publisher = self._publishers.get(query.worker.dp_rank)
        if query.worker.instance_id != self._instance_id or publisher is None:
            raise NotFoundError(
                f"worker {query.worker} is not served here; this is instance {format_instance_id(self._instance_id)} "
                f"with dp ranks {sorted(self._publishers)}",
                param="worker",
            )
        sink.send(KV_EVENT_BATCH.encode(publisher.answer(query.first, query.last)))


def _decode(payload: bytes) -> KvEventQuery:
    try:
        return KV_EVENT_QUERY.decode(payload)
    except BackendProtocolError as error:
        raise InvalidRequestError(f"the query cannot be read: {error.message}", reason="request.invalid") from error
