"""The generation APIs: requests in, running replies out."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from dynamo_core.enums import ModelType
from dynamo_core.errors import CancelledRequestError, DynamoError, InvalidRequestError
from dynamo_core.requests import Usage
from dynamo_core.tokens import token_count
from dynamo_frontend._admission import Admission
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._generation import Generation
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._observe import Observation, trace_fields
from dynamo_frontend._openai.fields import BodyDecoder, ChatRequest, CommonFields, CompletionRequest
from dynamo_frontend._openai.hints import TIMEOUT_HEADER, time_limit_s
from dynamo_frontend._openai.logprobs import LogprobFormat
from dynamo_frontend._openai.options import check_ranges
from dynamo_frontend._openai.stream import ChatStream, CompletionStream, ReplyHead, StreamUsage
from dynamo_frontend._openai.whole import ChatWhole, CompletionWhole
from dynamo_frontend._parsers.contract import OutputParser
from dynamo_frontend._plan import GeneratePlan, plan_chat, plan_completion
from dynamo_frontend._reply import ChoiceText, Reply, ReplyWriter
from dynamo_frontend._request_id import request_id_of, trace_of
from dynamo_frontend._services import GenerationServices
from dynamo_frontend._stop import StopMatcher
from dynamo_frontend._trace import TracedRequest, TraceLog
from dynamo_frontend._traffic import TrafficLog

F = TypeVar("F", bound=CommonFields)
WriterFactory = Callable[[HttpResponse, GeneratePlan, ReplyHead, StreamUsage], ReplyWriter]
# What is set aside for a request that does not say how much it may generate; the true amount is settled at its end.
_UNSAID_OUTPUT_TOKENS = 256
_CHAT = BodyDecoder(ChatRequest)
_COMPLETION = BodyDecoder(CompletionRequest)


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """How an API shows replies.

    Attributes:
        endpoint: Name for metrics.
        id_prefix: What reply ids begin with.
        writer: Makes the writer of a reply.
        reply: Makes the reply that feeds the writer.
    """

    endpoint: str
    id_prefix: str
    writer: WriterFactory
    reply: type[Reply] = Reply


class GenerateApi:
    """Answers chat and text completions.

    Args:
        services: What generations use.
        traffic: Where traffic is summed.
        overload_status: Status when all workers are busy.
        keep_alive_s: Seconds of silence after which a stream sends a sign of life; 0 for never.
        admission: Decides who may come in.
        trace: Where requests that are over are written; None for nowhere.
    """

    def __init__(
        self,
        services: GenerationServices,
        traffic: TrafficLog,
        admission: Admission,
        *,
        overload_status: int,
        keep_alive_s: float = 0.0,
        trace: TraceLog | None = None,
    ) -> None:
        self._trace = trace
        self.services = services
        self._traffic = traffic
        self._overload_status = overload_status
        self._keep_alive_s = keep_alive_s
        self._admission = admission

    async def chat(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v1/chat/completions``."""
        fields: ChatRequest = _CHAT.decode(request.body)
        model = self.find(fields, ModelType.CHAT)
        await self.serve(fields, model, plan_chat, request, response, _CHAT_FORM)

    async def completions(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v1/completions``."""
        fields: CompletionRequest = _COMPLETION.decode(request.body)
        model = self.find(fields, ModelType.COMPLETIONS)
        await self.serve(fields, model, plan_completion, request, response, _COMPLETION_FORM)

    def find(self, fields: CommonFields, kind: ModelType) -> ServedModel:
        """Return the model of a request whose numbers are within the API's limits.

        Raises:
            InvalidRequestError: for a number out of its limits, or an API that the model does not answer.
            NotFoundError, UnavailableError: as ``Catalog.find``.
        """
        check_ranges(fields)
        return self.find_model(fields.model, kind)

    def find_model(self, name: str, kind: ModelType) -> ServedModel:
        """Return a ready model that answers an API.

        Raises:
            InvalidRequestError: if it does not answer this one.
            NotFoundError, UnavailableError: as ``Catalog.find``.
        """
        model = self.services.catalog.find(name)
        if kind not in model.card.model_types:
            offered = ", ".join(sorted(item.value for item in model.card.model_types))
            raise InvalidRequestError(
                f"The model '{model.name}' does not answer {kind.value}; it offers {offered}.", param="model"
            )
        return model

    def limit_s(self, request: HttpRequest) -> float | None:
        """Return the seconds that a request may take; None for no limit.

        Raises:
            InvalidRequestError: if its header asks for something else.
        """
        most_s = self.services.timeout_s
        return time_limit_s(request.headers, most_s) if TIMEOUT_HEADER in request.headers else most_s

    @contextlib.contextmanager
    def counted(self, model: ServedModel, endpoint: str) -> Generator[None, None, None]:
        """Admit a request that the block answers, and count it from its start to its end.

        Raises:
            CapacityExhaustedError: as ``Admission.check``.
        """
        observation = self.observe(model, endpoint, stream=False)
        failure: DynamoError | None = CancelledRequestError("The client left.")
        try:
            with self._admission.entered(model):
                yield
            failure = None
        except DynamoError as error:
            failure = error
            raise
        finally:
            observation.end((), failure)

    async def serve(
        self,
        fields: F,
        model: ServedModel,
        planner: Callable[[F, ServedModel], Awaitable[GeneratePlan]],
        request: HttpRequest,
        response: HttpResponse,
        form: ReplyForm,
    ) -> None:
        """Plan a request and start its reply, which then flows by itself.

        Raises:
            DynamoError: if it cannot be planned or is not admitted; later failures are the reply's.
        """
        observation = self.observe(model, form.endpoint, stream=bool(fields.stream))
        request_id = request_id_of(request)
        try:
            self._admission.check(model)
            plan = await planner(fields, model)
            requests = plan.requests(request_id, request.headers, self.limit_s(request))
            reserved = _reserve(request, plan)
        except DynamoError as error:
            observation.end((), error)
            raise
        except BaseException:
            observation.end((), CancelledRequestError("The client left."))
            raise
        head = ReplyHead(
            form.id_prefix + request_id,
            int(self.services.clock.time()),
            fields.model,
            headers=lambda: _reply_headers(request, request_id, reply),
            overload_status=self._overload_status,
            keep_alive_s=self._keep_alive_s,
        )
        usage = _stream_usage(fields, lambda: reply.usage)
        writer = form.writer(response, plan, head, usage)

        def over(error: DynamoError | None) -> None:
            self._admission.leave()
            observation.end(reply.generations, error)
            if request.caller is not None:
                request.caller.settle(reserved, reply.usage.total_tokens)
            if self._trace is not None:
                fields = {"request_id": request_id, "endpoint": form.endpoint, **trace_fields(plan, reply, error)}
                self._trace.note(self._traced(fields, plan, request))

        reply = form.reply(_choice_texts(plan), writer, over)
        trace = trace_of(request)
        for index, item in enumerate(requests):
            sink = reply.sink(index, plan.choices_per_prompt)
            reply.generations.append(Generation(model, item, sink, self.services, trace))
        self._admission.enter()
        response.on_disconnect(lambda: reply.cancel(CancelledRequestError("The client left.")))
        response.on_drain(reply.resume)
        await reply.start()

    def _traced(self, fields: dict[str, Any], plan: GeneratePlan, request: HttpRequest) -> TracedRequest:
        now, size = self.services.clock.time(), plan.model.card.kv_block_size
        return TracedRequest(fields, now, plan.prompts, size, request.body)

    def observe(self, model: ServedModel, endpoint: str, *, stream: bool) -> Observation:
        """Count a request in."""
        return Observation(
            self.services.metrics,
            self._traffic,
            self.services.clock,
            model=model.name,
            endpoint=endpoint,
            stream=stream,
        )


def _reserve(request: HttpRequest, plan: GeneratePlan) -> int:
    """Set aside the tokens of a request whose caller's are limited: its prompts, and what it may generate."""
    caller = request.caller
    if caller is None or not caller.counts_tokens:
        return 0
    output = (plan.max_tokens or _UNSAID_OUTPUT_TOKENS) * plan.choices_per_prompt
    tokens = sum(token_count(prompt) + output for prompt in plan.prompts)
    caller.reserve(tokens)
    return tokens


def caller_headers(request: HttpRequest, request_id: str) -> dict[str, str]:
    """Return the response headers that every answer to a request has."""
    headers = {"x-request-id": request_id}
    if request.caller is not None:
        headers |= request.caller.headers()
    return headers


def _reply_headers(request: HttpRequest, request_id: str, reply: Reply) -> dict[str, str]:
    headers = caller_headers(request, request_id)
    decision = reply.generations[0].decision if reply.generations else None
    if decision is not None:
        headers["x-dynamo-worker-id"] = str(decision.worker)
        headers["x-dynamo-decision-id"] = decision.decision_id
    return headers


def _stream_usage(fields: CommonFields, current: Callable[[], Usage]) -> StreamUsage:
    options = fields.stream_options
    if options is None:
        return StreamUsage(current=current)
    return StreamUsage(options.include_usage, options.continuous_usage_stats, current)


def _choice_texts(plan: GeneratePlan) -> list[ChoiceText]:
    return [_choice_text(plan) for _ in range(len(plan.prompts) * plan.choices_per_prompt)]


def _choice_text(plan: GeneratePlan) -> ChoiceText:
    fields = plan.fields
    text = plan.model.text
    parser = _parser(plan)
    skip = True if fields.skip_special_tokens is None else fields.skip_special_tokens
    if parser is not None and parser.needs_special_tokens:
        skip = False
    given = [fields.stop] if isinstance(fields.stop, str) else (fields.stop or [])
    stops = [item for item in given if isinstance(item, str)]
    return ChoiceText(
        text.detokenizers.create(skip_special_tokens=skip),
        StopMatcher(stops, include=bool(fields.include_stop_str_in_output)) if stops else None,
        parser,
        min_tokens=fields.min_tokens or 0,
        single_call=plan.single_call,
    )


def _parser(plan: GeneratePlan) -> OutputParser | None:
    if plan.forced_parser is not None:
        return plan.forced_parser()
    return plan.model.text.parser(plan.tools, reasoning_open=plan.reasoning_open) if plan.chat else None


def logprob_format(plan: GeneratePlan) -> LogprobFormat | None:
    """Return how a reply shows log-probabilities; None if it does not."""
    if plan.logprobs is None:
        return None
    as_ids = bool(plan.fields.return_tokens_as_token_ids)
    return LogprobFormat(plan.model.text.detokenizers, as_token_ids=as_ids, top=plan.logprobs)


def _chat_writer(response: HttpResponse, plan: GeneratePlan, head: ReplyHead, usage: StreamUsage) -> ReplyWriter:
    logprobs = logprob_format(plan)
    if plan.fields.stream:
        return ChatStream(response, head, usage, logprobs)
    return ChatWhole(response, head, plan.choices_per_prompt, logprobs)


def _completion_writer(response: HttpResponse, plan: GeneratePlan, head: ReplyHead, usage: StreamUsage) -> ReplyWriter:
    logprobs = logprob_format(plan)
    if plan.fields.stream:
        return CompletionStream(response, head, usage, logprobs, plan.echoes)
    return CompletionWhole(response, head, len(plan.prompts) * plan.choices_per_prompt, logprobs, plan.echoes)


_CHAT_FORM = ReplyForm("chat_completions", "chatcmpl-", _chat_writer)
_COMPLETION_FORM = ReplyForm("completions", "cmpl-", _completion_writer)
