"""Grammars as generators over text that arrives in pieces.

A grammar is written as if all text were there: it reads from a ``Cursor``, and where the text does not suffice to
decide it yields and goes on with more. No decision looks at where a piece ended, so the result does not depend on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from dynamo_core.parsing import ArgumentsDelta, CallEnd, CallStart, ParsedDelta, ParserContext, TextDelta

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Part of a grammar: yields while it needs more text, returns what it read."""

MAX_BLANK = 32
"""White space before a marker belongs to the markup, up to this many characters."""

MAX_NAME = 256
"""Characters of a function's name; what is longer is no name."""

BLANKS = " \t\r\n"
_NAME = re.compile(r"[\w.:/\-]+")


class Markers:
    """Texts to stop at. None may be the beginning of another."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.search = re.compile("|".join(re.escape(text) for text in texts)).search
        self.first = re.compile("[" + "".join(re.escape(text[0]) for text in texts) + "]").search
        self._prefixes = {text[:size] for text in texts for size in range(1, len(text))}
        self._longest = max(len(text) for text in texts)

    def partial(self, text: str, start: int) -> int:
        """Length of the longest end of ``text[start:]`` that may begin one of the texts."""
        place = max(start, len(text) - self._longest + 1)
        while found := self.first(text, place):
            place = found.start()
            if text[place:] in self._prefixes:
                return len(text) - place
            place += 1
        return 0


class Output:
    """Gathers deltas. White space is held back until it is known whether a call follows."""

    def __init__(self) -> None:
        self._deltas: list[ParsedDelta] = []
        self._blank = ""
        self._after_call = False
        self._arguments: list[str] = []
        self.calling = False

    def take(self) -> Sequence[ParsedDelta]:
        """Return the deltas gathered since the last time."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def text(self, text: str) -> None:
        """Add to the answer."""
        if not self._blank and text and text[-1] not in BLANKS:
            self._after_call = False
            self._add_text(text, reasoning=False)
            return
        text = self._blank + text
        visible = len(text.rstrip(BLANKS))
        visible = max(visible, len(text) - MAX_BLANK)
        self._blank = text[visible:]
        if visible:
            self._after_call = False
            self._add_text(text[:visible], reasoning=False)

    def reasoning(self, text: str) -> None:
        """Add to the reasoning."""
        if text:
            self._add_text(text, reasoning=True)

    def plain(self, text: str) -> None:
        """Add to the answer at once, white space as well: for parsers that know no calls."""
        if text:
            self._add_text(text, reasoning=False)

    def start(self, name: str) -> None:
        """Begin a call."""
        self._blank = ""
        self._arguments = []
        self.calling = True
        self._deltas.append(CallStart(name))

    def arguments(self, text: str) -> None:
        """Add to the open call's arguments."""
        if not text:
            return
        self._arguments.append(text)
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, ArgumentsDelta):
            self._deltas[-1] = ArgumentsDelta(last.text + text)
        else:
            self._deltas.append(ArgumentsDelta(text))

    @property
    def arguments_are_empty(self) -> bool:
        """Whether the open call has no arguments so far."""
        return not self._arguments

    def end(self) -> None:
        """End the open call; it is complete if its arguments are JSON."""
        self.calling = False
        self._after_call = True
        self._deltas.append(CallEnd(is_json("".join(self._arguments))))

    def close(self) -> None:
        """The text has ended."""
        if self.calling:
            self.end()
        if self._blank and not self._after_call:
            self._add_text(self._blank, reasoning=False)
        self._blank = ""

    def _add_text(self, text: str, *, reasoning: bool) -> None:
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, TextDelta) and last.reasoning == reasoning:
            self._deltas[-1] = TextDelta(last.text + text, reasoning)
        else:
            self._deltas.append(TextDelta(text, reasoning))


def is_json(text: str) -> bool:
    """Return whether a text is one JSON value."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


class Cursor:
    """Where a grammar reads.

    Attributes:
        out: Where it writes.
        text: Text at hand.
        at: Place of the next character in it.
        ended: Whether no more text comes.
        idle: What waits for text, if none is held back: the markers that it looks for and where all else goes.
    """

    def __init__(self) -> None:
        self.out = Output()
        self.text = ""
        self.at = 0
        self.ended = False
        self.idle: tuple[Markers, Callable[[str], None]] | None = None
        self._mark: int | None = None

    def push(self, text: str) -> None:
        """Take the next text."""
        start = self.at if self._mark is None else self._mark
        self.text = self.text[start:] + text
        self.at -= start
        if self._mark is not None:
            self._mark = 0

    def mark(self) -> None:
        """Remember the text from here on, so that it can be given back."""
        self._mark = self.at

    def release(self) -> str:
        """Forget the mark; return the text read since it."""
        text = self.text[self._mark : self.at]
        self._mark = None
        return text

    def rewind(self) -> None:
        """Go back to the mark and forget it."""
        if self._mark is not None:
            self.at = self._mark
            self._mark = None

    def give_back(self, marker: str = "") -> Steps[None]:
        """Give a marker and the text since the mark to the answer. What the end of the output cut off is dropped."""
        cut_off = not (yield from self.peek())
        text = marker + self.release()
        if not cut_off:
            self.out.text(text)

    def more(self) -> Steps[bool]:
        """Wait for more text; return False if none comes."""
        if self.ended:
            return False
        yield
        return True

    def peek(self) -> Steps[str]:
        """Return the next character without taking it; empty at the end."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def spaces(self, limit: int | None = None) -> Steps[str]:
        """Take white space, ``limit`` characters at most; return it."""
        taken: list[str] = []
        while len(taken) != limit and (char := (yield from self.peek())) and char in BLANKS:
            taken.append(char)
            self.at += 1
        return "".join(taken)

    def accept(self, *options: str) -> Steps[str]:
        """Take the first of the options that the text goes on with; return it, or an empty string."""
        longest = max(len(option) for option in options)
        while True:
            rest = self.text[self.at : self.at + longest]
            for option in options:
                if rest.startswith(option):
                    self.at += len(option)
                    return option
                if option.startswith(rest) and not self.ended:
                    break
            else:
                return ""
            yield

    def until(self, markers: Markers, emit: Callable[[str], None]) -> Steps[str]:
        """Give all text before a marker to ``emit``, take the marker and return it; empty at the end."""
        while True:
            text, at = self.text, self.at
            found = markers.search(text, at)
            if found is not None:
                if found.start() > at:
                    emit(text[at : found.start()])
                self.at = found.end()
                return found.group()
            self.at = len(text) if self.ended else len(text) - markers.partial(text, at)
            if self.at > at:
                emit(text[at : self.at])
            if self.ended:
                return ""
            self.idle = (markers, emit) if self.at == len(text) and self._mark is None else None
            yield
            self.idle = None

    def prose(self, markers: Markers) -> Steps[str]:
        """Give text to the answer up to a marker; return the marker, or an empty string at the end."""
        return (yield from self.until(markers, self.out.text))

    def rest(self, emit: Callable[[str], None]) -> Steps[None]:
        """Give all text to the end to ``emit``."""
        while (yield from self.peek()):
            emit(self.text[self.at :])
            self.at = len(self.text)

    def collect(self, markers: Markers) -> Steps[tuple[str, str]]:
        """Return all text before a marker, and the marker."""
        taken: list[str] = []
        marker = yield from self.until(markers, taken.append)
        return "".join(taken), marker

    def name(self, *ends: str) -> Steps[tuple[str, str]]:
        """Read a function's name, white space around it included, and what ends it.

        Returns:
            The name and its end, both taken. Both are empty as soon as the text can be no name.
        """
        yield from self.spaces(MAX_BLANK)
        name = ""
        while True:
            end = yield from self.accept(*ends)
            if end:
                return name, end
            char = yield from self.peek()
            if char and char in BLANKS and name:
                yield from self.spaces(MAX_BLANK)
                end = yield from self.accept(*ends)
                return (name, end) if end else ("", "")
            if not char or len(name) == MAX_NAME or not _NAME.match(char):
                return "", ""
            self.at += 1
            name += char


class GrammarParser:
    """An ``OutputParser`` that runs a grammar. Text after the grammar's end is plain."""

    def __init__(self, grammar: Callable[[Cursor], Steps[None]]) -> None:
        self._cursor = Cursor()
        self._steps: Steps[None] | None = grammar(self._cursor)

    def feed(self, text: str) -> Sequence[ParsedDelta]:
        """Take the next text."""
        if self._steps is None:
            return [TextDelta(text)] if text else []
        cursor = self._cursor
        idle = cursor.idle
        if idle is not None and text and idle[0].first(text) is None:
            # Nothing in this text can begin a marker: the common case, without waking the grammar.
            idle[1](text)
        else:
            cursor.push(text)
            self._resume()
        return cursor.out.take()

    def finish(self) -> Sequence[ParsedDelta]:
        """Return what was held back."""
        self._cursor.ended = True
        self._resume()
        self._cursor.out.close()
        return self._cursor.out.take()

    def _resume(self) -> None:
        if self._steps is None:
            return
        try:
            next(self._steps)
        except StopIteration:
            self._steps = None
            self._cursor.out.plain(self._cursor.text[self._cursor.at :])


Grammar = Callable[[Cursor, ParserContext], Steps[None]]
"""A grammar of one family: reads the cursor, knowing the request."""


class GrammarFactory:
    """A ``ParserFactory`` for a grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def __call__(self, context: ParserContext) -> GrammarParser:
        """Return a parser for one choice."""
        return GrammarParser(lambda cursor: self._grammar(cursor, context))
