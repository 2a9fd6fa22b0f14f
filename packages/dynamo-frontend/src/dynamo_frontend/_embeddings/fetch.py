"""One vector from a worker, with another worker in reserve."""

from __future__ import annotations

from array import array

import msgspec

from dynamo_core.content import ContentPart
from dynamo_core.enums import FinishReason, PartKind
from dynamo_core.errors import BackendProtocolError, DynamoError
from dynamo_core.ids import WorkerId
from dynamo_core.planes import CallOptions
from dynamo_core.requests import GenerateRequest
from dynamo_core.routing import RequestOutcome, RoutingDecision
from dynamo_core.streams import open_stream
from dynamo_core.tokens import token_count
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST
from dynamo_frontend._attempts import chunk_error, routing_request
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._services import GenerationServices


async def fetch_vector(model: ServedModel, request: GenerateRequest, services: GenerationServices) -> array[float]:
    """Return the embedding of one prompt. Cancelling kills the call.

    Raises:
        DynamoError: what ended the last attempt.
    """
    excluded: list[WorkerId] = []
    while True:
        routed = routing_request(request, model.card, (*model.excluded, *excluded))
        decision = await model.router.select(routed)
        outcome = RequestOutcome(decision.decision_id, FinishReason.CANCELLED, token_count(request.token_ids))
        try:
            vector = await _call(model, request, decision, services)
            outcome = msgspec.structs.replace(outcome, finish_reason=FinishReason.STOP)
        except DynamoError as error:
            outcome = msgspec.structs.replace(outcome, finish_reason=FinishReason.ERROR, error_reason=error.reason)
            if not error.migratable or len(excluded) >= services.migration_limit:
                raise
            excluded.append(decision.worker)
            model.router.inhibit(decision.worker, error.reason)
            services.metrics.migrated(model.name, ongoing=False)
        else:
            return vector
        finally:
            if decision.reservation is not None:
                model.router.complete(decision.reservation, outcome)


async def _call(
    model: ServedModel, request: GenerateRequest, decision: RoutingDecision, services: GenerationServices
) -> array[float]:
    address = await services.catalog.address(model.endpoint, decision.worker.instance_id)
    options = CallOptions(
        request_id=request.request_id, deadline_s=request.deadline_s, schema=model.card.endpoint_types.request
    )
    payload = GENERATE_REQUEST.encode(request)
    found: list[ContentPart] = []
    async with await open_stream(services.plane, address, model.endpoint, payload, options) as stream:
        async for item in stream:
            chunk = GENERATE_CHUNK.decode(item)
            if chunk.error is not None or chunk.finish_reason is FinishReason.ERROR:
                raise chunk_error(chunk)
            found.extend(chunk.parts)
    if len(found) != 1:
        raise BackendProtocolError(f"The worker sent {len(found)} vectors for one input.", reason="backend.protocol")
    return _vector(found[0])


def _vector(part: ContentPart) -> array[float]:
    vector = array("f")
    if part.kind is not PartKind.TENSOR or part.dtype != "f32" or not part.data or len(part.data) % vector.itemsize:
        raise BackendProtocolError("The worker's output is no vector of f32.", reason="backend.protocol")
    vector.frombytes(part.data)
    return vector
