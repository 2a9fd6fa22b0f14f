"""From accepted tokens to API output: one reply joins the generations of a request and feeds its writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynamo_core.enums import FinishReason
from dynamo_core.errors import DynamoError
from dynamo_core.parsing import ArgumentsDelta, CallEnd, CallStart, ParsedDelta, TextDelta
from dynamo_core.requests import TokenLogprob, Usage
from dynamo_frontend._detokenize import Detokenizer
from dynamo_frontend._generation import Generation
from dynamo_frontend._parsers.contract import OutputParser
from dynamo_frontend._stop import StopMatcher
from dynamo_frontend._writer import ReplyWriter, SilentWriter

FINISH_NAMES = {FinishReason.LENGTH: "length", FinishReason.CONTENT_FILTER: "content_filter"}


class ChoiceText:
    """Text of one choice: detokenised, watched for stop strings, parsed.

    Args:
        detokenizer: Of this choice.
        matcher: For its stop strings; None without any.
        parser: For its reasoning and tool calls; None without any.
        min_tokens: Tokens before which no stop string counts.
        single_call: End the choice after its first tool call.
    """

    __slots__ = (
        "_count",
        "_detokenizer",
        "_matcher",
        "_min_tokens",
        "_single_call",
        "_thinking",
        "calls",
        "ended_calls",
        "parser",
        "reasoning_tokens",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        matcher: StopMatcher | None = None,
        parser: OutputParser | None = None,
        *,
        min_tokens: int = 0,
        single_call: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._min_tokens = min_tokens
        self._single_call = single_call
        self._count = 0
        self.parser = parser
        self.calls = 0
        self.ended_calls = 0
        self.reasoning_tokens = 0
        # Tokens so far while no answer has begun; None once one has, or without a parser.
        self._thinking = 0 if parser is not None else None

    def push(self, token_ids: list[int]) -> tuple[str, int | None]:
        """Return the new visible text, and how many of the tokens count if a stop string was met."""
        matcher = self._matcher
        if matcher is None:
            return self._detokenizer.push(token_ids), None
        found: list[str] = []
        # Token by token, so that where a choice ends does not depend on how its tokens were batched.
        for index, token in enumerate(token_ids):
            self._count += 1
            text = self._detokenizer.push((token,))
            found.append(matcher.push(text) if self._count >= self._min_tokens else text)
            if matcher.matched is not None:
                return "".join(found), index + 1
        return "".join(found), None

    @property
    def thinking(self) -> bool:
        """Whether the answer has yet to begin, so that tokens may be reasoning and are looked at one by one."""
        return self._thinking is not None

    def note(self, deltas: Sequence[ParsedDelta], tokens: int) -> None:
        """Count reasoning: all tokens before the one that begins the answer, markers included, if any was reasoning."""
        if self._thinking is None:
            return
        for delta in deltas:
            if not (isinstance(delta, TextDelta) and delta.reasoning):
                self._thinking = None
                return
        self._thinking += tokens
        if deltas or self.reasoning_tokens:
            self.reasoning_tokens = self._thinking

    def finish(self) -> str:
        """Return the text that was held back; nothing after a stop string."""
        if self._matcher is None:
            return self._detokenizer.finish()
        if self._matcher.matched is not None:
            return ""
        rest = self._matcher.push(self._detokenizer.finish())
        return rest if self._matcher.matched is not None else rest + self._matcher.finish()

    @property
    def stop(self) -> str | None:
        """Stop string that ended the choice, if one did."""
        return self._matcher.matched if self._matcher is not None else None

    def count_call(self) -> int:
        """Return the index of a further tool call."""
        self.calls += 1
        return self.calls - 1

    @property
    def wants_no_more(self) -> bool:
        """Whether the choice is to end after the call it has made."""
        return self._single_call and self.ended_calls > 0


_SILENT = SilentWriter()


def _nothing(error: DynamoError | None) -> None:
    """Be called once more to no effect."""


class PromptSink:
    """Sink of one prompt's generation within a reply."""

    def __init__(self, reply: Reply, first_choice: int) -> None:
        self._reply = reply
        self._first = first_choice

    def tokens(self, choice: int, token_ids: list[int], logprobs: Sequence[TokenLogprob]) -> int | None:
        """Take new tokens."""
        return self._reply.take(self._first + choice, token_ids, logprobs)

    def finished(self, choice: int, reason: FinishReason) -> None:
        """A choice ended."""
        self._reply.finish_choice(self._first + choice, reason)

    def flush(self) -> None:
        """Everything that arrived together has been given."""
        self._reply.flush()

    def done(self, usage: Usage) -> None:
        """All choices of this prompt ended."""
        self._reply.prompt_done()

    def failed(self, error: DynamoError) -> None:
        """This prompt cannot go on, so the reply cannot."""
        self._reply.fail(error)

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        return self._reply.writer.writable


class Reply:
    """One HTTP request's answer: several prompts, each with several choices.

    Args:
        choices: Text of every choice, in the order of their indices.
        writer: Writes the API's form.
        on_over: Called once with the error that ended the reply, or None.
    """

    def __init__(
        self, choices: list[ChoiceText], writer: ReplyWriter, on_over: Callable[[DynamoError | None], None]
    ) -> None:
        self.writer: ReplyWriter = writer
        self.generations: list[Generation] = []
        self.over = False
        self._choices = choices
        self._on_over = on_over
        self._done_prompts = 0

    def sink(self, prompt: int, choices_per_prompt: int) -> PromptSink:
        """Return the sink of a prompt's generation."""
        return PromptSink(self, prompt * choices_per_prompt)

    async def start(self) -> None:
        """Start all generations; output then flows by itself.

        Raises:
            DynamoError: if one cannot start; the reply has then been failed.
        """
        try:
            for generation in self.generations:
                if self.over:
                    return
                await generation.start()
        except DynamoError as error:
            self.fail(error)

    def take(self, choice: int, token_ids: list[int], logprobs: Sequence[TokenLogprob]) -> int | None:
        """Take new tokens of a choice; see ``GenerationSink.tokens``."""
        state = self._choices[choice]
        parser = state.parser
        if parser is None:
            text, counted = state.push(token_ids)
            if counted is not None and logprobs:
                logprobs = logprobs[:counted]
            if text or logprobs:
                self.writer.text(choice, text, logprobs)
            return counted
        if state.thinking:
            deltas, counted = _think(state, parser, token_ids)
        else:
            text, counted = state.push(token_ids)
            deltas = parser.feed(text) if text else ()
        if counted is not None and logprobs:
            logprobs = logprobs[:counted]
        if deltas or logprobs:
            self._write_parsed(choice, deltas, logprobs)
            if counted is None and state.wants_no_more:
                return len(token_ids)
        return counted

    def finish_choice(self, choice: int, reason: FinishReason) -> None:
        """End a choice: what was held back comes first."""
        state = self._choices[choice]
        rest = "" if state.wants_no_more else state.finish()
        parser = state.parser
        if parser is None:
            if rest:
                self.writer.text(choice, rest, ())
        else:
            if rest and (deltas := parser.feed(rest)):
                state.note(deltas, 0)
                self._write_parsed(choice, deltas, ())
            if not state.wants_no_more and (deltas := parser.finish()):
                state.note(deltas, 0)
                self._write_parsed(choice, deltas, ())
        name = FINISH_NAMES.get(reason, "stop")
        self.writer.finish(choice, "tool_calls" if state.calls and name == "stop" else name, state.stop)

    def flush(self) -> None:
        """Send what has been written."""
        if not self.over:
            self.writer.flush()

    def prompt_done(self) -> None:
        """One more prompt is complete."""
        self._done_prompts += 1
        if self._done_prompts == len(self.generations) and not self.over:
            self.over = True
            self.writer.done(self.usage)
            self._end(None)

    def fail(self, error: DynamoError) -> None:
        """End everything with an error. Idempotent."""
        if self.over:
            return
        self.over = True
        for generation in self.generations:
            generation.cancel()
        self.writer.failed(error)
        self._end(error)

    def cancel(self, error: DynamoError) -> None:
        """The client left: stop all workers at once, write nothing. Idempotent."""
        if self.over:
            return
        self.over = True
        for generation in self.generations:
            generation.cancel()
        self._end(error)

    def resume(self) -> None:
        """The client has caught up."""
        for generation in self.generations:
            generation.resume()

    @property
    def usage(self) -> Usage:
        """Sum over the prompts."""
        parts = [generation.usage for generation in self.generations]
        if len(parts) == len(self._choices) == 1 and not self._choices[0].reasoning_tokens:
            return parts[0]
        return Usage(
            sum(part.prompt_tokens for part in parts),
            sum(part.completion_tokens for part in parts),
            sum(part.cached_tokens for part in parts),
            # The worker's count where it has one: it knows the model's own markers.
            sum(part.reasoning_tokens for part in parts) or sum(state.reasoning_tokens for state in self._choices),
        )

    def _end(self, error: DynamoError | None) -> None:
        """Tell of the end, and take apart what refers to each other.

        A reply, its writer and its generations form circles; left whole, each would wait for the garbage collector.
        """
        on_over, self._on_over = self._on_over, _nothing
        on_over(error)
        self.generations = []
        self.writer = _SILENT

    def _write_parsed(self, choice: int, deltas: Sequence[ParsedDelta], logprobs: Sequence[TokenLogprob]) -> None:
        state = self._choices[choice]
        writer = self.writer
        for delta in deltas:
            if state.wants_no_more:
                break
            if isinstance(delta, TextDelta):
                if delta.reasoning:
                    writer.reasoning(choice, delta.text)
                else:
                    writer.text(choice, delta.text, logprobs)
                    logprobs = ()
                continue
            match delta:
                case CallStart(name=name):
                    writer.call_start(choice, state.count_call(), name)
                case ArgumentsDelta(text=text):
                    writer.call_arguments(choice, text)
                case CallEnd(complete=complete):
                    state.ended_calls += 1
                    writer.call_end(choice, complete=complete)
        if logprobs:
            self.writer.text(choice, "", logprobs)


def _think(state: ChoiceText, parser: OutputParser, token_ids: list[int]) -> tuple[list[ParsedDelta], int | None]:
    """Take tokens while the answer has yet to begin; return what they are, and how many count if a stop string was met.

    One by one until it begins: how many tokens were reasoning must not depend on their batches.
    """
    deltas: list[ParsedDelta] = []
    done = 0
    while done < len(token_ids):
        piece = token_ids[done : done + 1] if state.thinking else token_ids[done:]
        text, met = state.push(piece)
        found = parser.feed(text) if text else ()
        state.note(found, len(piece))
        deltas.extend(found)
        if met is not None:
            return deltas, done + met
        done += len(piece)
    return deltas, None


__all__ = ["ChoiceText", "PromptSink", "Reply", "ReplyWriter"]
