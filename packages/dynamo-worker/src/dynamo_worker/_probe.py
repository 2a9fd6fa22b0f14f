"""Sends a canary through the real path: request plane, admission, engine, and back."""

from __future__ import annotations

from dynamo_core.clock import Clock
from dynamo_core.errors import DynamoError, ErrorClass
from dynamo_core.ids import EndpointId, new_request_id
from dynamo_core.planes import CallOptions, RequestPlane
from dynamo_core.requests import GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.streams import open_stream
from dynamo_core.tokens import pack_tokens
from dynamo_core.wire import GENERATE_REQUEST
from dynamo_worker._deadline import within
from dynamo_worker._metrics import WorkerMetrics

# Whoever answers with one of these is alive: it looked at the request and said no.
_ALIVE = frozenset(
    {
        ErrorClass.INVALID_REQUEST,
        ErrorClass.UNSUPPORTED_MEDIA,
        ErrorClass.NOT_IMPLEMENTED,
        ErrorClass.NOT_FOUND,
        ErrorClass.CAPACITY_EXHAUSTED,
    }
)


class Probe:
    """Asks one endpoint for one token.

    Args:
        plane: Request plane to go through.
        address: Where the endpoint is served.
        endpoint: What it is.
        model: Model name.
        timeout_s: Seconds in which the answer must be complete.
        clock: Time.
        metrics: Where outcomes are counted.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        plane: RequestPlane,
        *,
        address: str,
        endpoint: EndpointId,
        model: str,
        timeout_s: float,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        self._plane = plane
        self._address = address
        self._endpoint = endpoint
        self._model = model
        self._timeout_s = timeout_s
        self._clock = clock
        self._metrics = metrics

    async def failure(self) -> str:
        """Return why the engine cannot serve, or an empty string if it answered."""
        try:
            await within(self._clock, self._timeout_s, self._ask())
        except TimeoutError:
            reason = f"a probe was not answered within {self._timeout_s} s"
        except DynamoError as error:
            reason = "" if error.error_class in _ALIVE else f"a probe failed: {error.message}"
        else:
            reason = ""
        self._metrics.probes.labels(outcome="failed" if reason else "answered").inc()
        return reason

    async def _ask(self) -> None:
        request = GenerateRequest(
            new_request_id(),
            self._model,
            pack_tokens([1]),
            sampling=SamplingOptions(temperature=0.0),
            stop=StopConditions(max_tokens=1, ignore_eos=True),
            health_check=True,
        )
        options = CallOptions(request_id=request.request_id)
        stream = await open_stream(
            self._plane, self._address, self._endpoint, GENERATE_REQUEST.encode(request), options
        )
        try:
            while await stream.receive():
                pass
        finally:
            stream.cancel(kill=True)
