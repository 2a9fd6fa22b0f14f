"""The machine that grammars run on."""

import pytest

from dynamo_core.parsing import TextDelta
from dynamo_frontend._parsers.machine import MAX_BLANK, MAX_NAME, Cursor, GrammarParser, Markers


def run(grammar, *pieces):
    """Run a grammar that writes its results down; return them and the answer text."""
    found = []
    parser = GrammarParser(lambda cursor: grammar(cursor, found))
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    deltas += parser.finish()
    return found, "".join(delta.text for delta in deltas)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("", 0),
        ("abc", 0),
        ("a<", 1),
        ("a<to", 3),
        ("a<<to", 3),
        ("<tool", 5),
        ("a<tx", 0),
        ("a[", 1),
        ("a[/", 2),
        ("]<", 1),
    ],
)
def test_held_is_the_longest_end_that_may_begin_a_marker(text, held):
    assert Markers("<tool>", "[/x]").partial(text, 0) == held


def test_nothing_before_the_start_is_held():
    assert Markers("<tool>").partial("<to", 1) == 0


def test_the_earliest_marker_wins_and_is_not_part_of_the_text():
    def grammar(cursor, found):
        while marker := (yield from cursor.prose(Markers("<b>", "<a>"))):
            found.append(marker)

    assert run(grammar, "x<a", ">y<b>z<a") == (["<a>", "<b>"], "xyz<a")


def test_the_first_of_the_options_that_can_still_match_is_waited_for():
    def grammar(cursor, found):
        found.append((yield from cursor.accept("\n--", "\n")))

    assert run(grammar, "\n", "-", "-")[0] == ["\n--"]
    assert run(grammar, "\n", "-", "x")[0] == ["\n"]
    assert run(grammar, "\n")[0] == ["\n"]
    assert run(grammar, "x")[0] == [""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("get_weather(", ("get_weather", "(")),
        (" \n a.b-c:1 \n(", ("a.b-c:1", "(")),
        ("two words(", ("", "")),
        ("no!(", ("", "")),
        ("cut", ("", "")),
        ("(", ("", "(")),
        ("x" * MAX_NAME + "(", ("x" * MAX_NAME, "(")),
        ("x" * (MAX_NAME + 1) + "(", ("", "")),
    ],
)
def test_names(text, expected):
    def grammar(cursor, found):
        found.append((yield from cursor.name("(")))

    assert run(grammar, text)[0] == [expected]
    assert run(grammar, *text)[0] == [expected]


def test_text_since_a_mark_can_be_given_back_or_read_again():
    def grammar(cursor, found):
        cursor.mark()
        found.append((yield from cursor.accept("abc")))
        cursor.rewind()
        cursor.mark()
        found.append((yield from cursor.accept("ab")))
        yield from cursor.peek()
        found.append(cursor.release())

    assert run(grammar, *"abcd")[0] == ["abc", "ab", "ab"]


def test_what_the_end_cuts_off_is_not_given_back():
    def grammar(cursor, found):
        cursor.mark()
        yield from cursor.accept("call")
        yield from cursor.give_back("<m>")

    assert run(grammar, "call")[1] == ""
    assert run(grammar, "call", "!")[1] == "<m>call!"


@pytest.mark.parametrize(("blanks", "shown"), [(MAX_BLANK, 0), (MAX_BLANK + 3, 3)])
def test_white_space_before_a_call_is_dropped_up_to_a_bound(blanks, shown):
    def grammar(cursor, found):
        yield from cursor.prose(Markers("!"))
        cursor.out.start("f")
        cursor.out.arguments("{}")
        cursor.out.end()

    parser = GrammarParser(lambda cursor: grammar(cursor, []))
    deltas = list(parser.feed(f"a{' ' * blanks}!"))
    assert deltas[0] == TextDelta("a" + " " * shown)
    assert len(deltas) == 4


def test_text_behind_a_grammar_is_plain():
    def grammar(cursor, found):
        yield from cursor.accept("x")

    parser = GrammarParser(lambda cursor: grammar(cursor, []))
    parser.feed("x")
    assert list(parser.feed("y ")) == [TextDelta("y ")]
    assert list(parser.feed("")) == []
    assert list(parser.finish()) == []


def test_a_grammar_that_ends_early_leaves_what_it_did_not_read():
    def grammar(cursor, found):
        yield from cursor.accept("x")

    assert run(grammar, "xyz") == ([], "yz")


def test_a_cursor_without_text_is_at_its_end():
    cursor = Cursor()
    cursor.ended = True
    with pytest.raises(StopIteration) as stopped:
        next(cursor.peek())
    assert stopped.value.value == ""
