"""Reasoning between markers, as most models write it, and behind phrases, as Granite does."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dynamo_core.parsing import OutputParser, ParsedDelta, ParserContext, TextDelta
from dynamo_frontend._parsers.machine import BLANKS, MAX_BLANK, Cursor, GrammarParser, Markers, Steps


class TaggedReasoning:
    """Grammar of reasoning between two markers.

    Line breaks behind a marker belong to the markup. A closing marker that closes nothing is dropped at the beginning
    of the output, where the prompt had the opening one.

    Args:
        open_tag: Begins the reasoning.
        close_tag: Ends it.
        forced: Whether the output begins inside, unless the prompt says otherwise.
        label: Text that may follow the opening marker and belongs to it.
        boundaries: Texts that end the reasoning and are themselves for the tool-call parser.
    """

    def __init__(
        self,
        open_tag: str = "<think>",
        close_tag: str = "</think>",
        *,
        forced: bool = False,
        label: str = "",
        boundaries: tuple[str, ...] = (),
    ) -> None:
        self.tags = (open_tag, close_tag)
        self.wakes = re.compile(f"[{re.escape(open_tag[0])}{re.escape(close_tag[0])}]").search
        self._forced = forced
        self._label = label
        self._open = Markers(open_tag)
        self._close = Markers(close_tag, *boundaries)
        self._boundaries = boundaries

    def parser(self, context: ParserContext) -> OutputParser:
        """Return a parser of one choice."""
        if self._begins_inside(context):
            return GrammarParser(lambda cursor: self(cursor, context))
        return _PlainFirst(self, context)

    def __call__(self, cursor: Cursor, context: ParserContext) -> Steps[None]:
        """Read the output of one choice."""
        inside = yield from self._beginning(cursor, inside=self._begins_inside(context))
        yield from self.on(cursor, inside=inside)

    def on(self, cursor: Cursor, *, inside: bool) -> Steps[None]:
        """Read what follows the beginning, inside or outside of the reasoning."""
        while True:
            if inside:
                marker = yield from cursor.until(self._close, cursor.out.reasoning)
            else:
                marker = yield from cursor.until(self._open, cursor.out.plain)
            if not marker:
                return
            inside = not inside
            if marker in self._boundaries:
                cursor.at -= len(marker)
            else:
                yield from self._behind_tag(cursor, opened=inside)

    def _begins_inside(self, context: ParserContext) -> bool:
        return self._forced if context.reasoning_open is None else context.reasoning_open

    def _beginning(self, cursor: Cursor, *, inside: bool) -> Steps[bool]:
        """Take a first marker that changes nothing; return whether the reasoning is open."""
        open_tag, close_tag = self.tags
        cursor.mark()
        yield from cursor.spaces(MAX_BLANK)
        tag = yield from cursor.accept(open_tag, close_tag)
        if not tag:
            cursor.rewind()
            if inside:
                yield from self._line_breaks(cursor)
            return inside
        cursor.release()
        yield from self._behind_tag(cursor, opened=tag == open_tag)
        return tag == open_tag

    def _behind_tag(self, cursor: Cursor, *, opened: bool) -> Steps[None]:
        if opened and self._label:
            yield from cursor.accept(self._label)
        yield from self._line_breaks(cursor)

    def _line_breaks(self, cursor: Cursor) -> Steps[None]:
        while (yield from cursor.accept("\n")):
            pass


class _PlainFirst:
    """Parser of an output that begins with the answer, as most do: what may begin a marker wakes the grammar.

    Args:
        grammar: The grammar.
        context: The request.
    """

    def __init__(self, grammar: TaggedReasoning, context: ParserContext) -> None:
        self._grammar = grammar
        self._context = context
        self._begun = False
        self._woken: GrammarParser | None = None

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        if self._woken is not None:
            return self._woken.feed(text)
        if not text:
            return ()
        # White space alone may yet belong to a marker behind it.
        if self._grammar.wakes(text) is None and (self._begun or text.strip(BLANKS)):
            self._begun = True
            return (TextDelta(text),)
        self._woken = GrammarParser(self._steps)
        return self._woken.feed(text)

    def finish(self) -> Sequence[ParsedDelta]:
        """Return what was held back."""
        return () if self._woken is None else self._woken.finish()

    def _steps(self, cursor: Cursor) -> Steps[None]:
        return self._grammar.on(cursor, inside=False) if self._begun else self._grammar(cursor, self._context)


class PhraseReasoning:
    """Grammar of reasoning that a phrase at the beginning opens and another phrase closes.

    Args:
        open_phrases: Any of them opens.
        close_phrases: Any of them closes.
    """

    def __init__(self, open_phrases: tuple[str, ...], close_phrases: tuple[str, ...]) -> None:
        self._open = open_phrases
        self._close = Markers(*close_phrases)

    def __call__(self, cursor: Cursor, context: ParserContext) -> Steps[None]:
        """Read the output of one choice."""
        cursor.mark()
        yield from cursor.spaces(MAX_BLANK)
        opened = yield from cursor.accept(*self._open)
        if opened or context.reasoning_open:
            cursor.release()
            yield from cursor.spaces(MAX_BLANK)
            yield from cursor.until(self._close, cursor.out.reasoning)
            yield from cursor.spaces(MAX_BLANK)
        else:
            cursor.rewind()
        yield from cursor.rest(cursor.out.plain)


THINK = TaggedReasoning()
FORCED_THINK = TaggedReasoning(forced=True)
KIMI_THINK = TaggedReasoning("◁think▷", "◁/think▷")
KIMI_K25_THINK = TaggedReasoning(
    forced=True, boundaries=("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>", "<|tool_call_begin|>")
)
MINIMAX_M3_THINK = TaggedReasoning("<mm:think>", "</mm:think>")
MISTRAL_THINK = TaggedReasoning("[THINK]", "[/THINK]", forced=True)
GEMMA4_CHANNEL = TaggedReasoning("<|channel>", "<channel|>", label="thought\n")
GRANITE_PHRASES = PhraseReasoning(
    ("Here's my thought process:", "Here is my thought process:"), ("Here's my response:", "Here is my response:")
)
