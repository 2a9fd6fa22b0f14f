"""Calls without markers, where the request forces a call and the output is constrained to it."""

from __future__ import annotations

from dynamo_frontend._parsers.chain import ParserChain
from dynamo_frontend._parsers.json_text import arguments_value, call_sequence
from dynamo_frontend._parsers.machine import Cursor, GrammarParser, Steps


def forced_calls() -> ParserChain:
    """Return a parser of output that is an array of calls."""
    return ParserChain(None, GrammarParser(_calls))


def forced_call(name: str) -> ParserChain:
    """Return a parser of output that is the arguments of one function."""
    return ParserChain(None, GrammarParser(lambda cursor: _call(cursor, name)))


def _calls(cursor: Cursor) -> Steps[None]:
    cursor.mark()
    yield from cursor.spaces()
    only_calls = yield from call_sequence(cursor)
    if cursor.out.calling:
        yield from cursor.rest(cursor.out.arguments)
        return
    rest = cursor.release()
    cursor.out.text("" if only_calls else rest)
    yield from cursor.rest(cursor.out.text)


def _call(cursor: Cursor, name: str) -> Steps[None]:
    yield from cursor.spaces()
    if (yield from cursor.peek()) == "{":
        cursor.out.start(name)
        if (yield from arguments_value(cursor)):
            cursor.out.end()
        yield from cursor.rest(cursor.out.arguments if cursor.out.calling else cursor.out.text)
    yield from cursor.rest(cursor.out.text)
