"""Stop strings across any cut of the text."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dynamo_frontend._stop import StopMatcher

LETTERS = st.text(alphabet="abc", max_size=14)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3)


def by_reading(text, stops, include):
    """The definition: read on until the text so far ends with a stop string."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[:end] if include else text[: end - len(longest)]
    return text


@given(text=LETTERS, stops=STOPS, cuts=st.sets(st.integers(0, 14)), include=st.booleans())
def test_equals_reading_character_by_character(text, stops, cuts, include):
    matcher = StopMatcher(stops, include=include)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    shown = ""
    for start, end in itertools.pairwise(bounds):
        shown += matcher.push(text[start:end])
        held = 0 if matcher.matched else end - len(shown)
        assert held < max(map(len, stops))
    if matcher.matched is None:
        shown += matcher.finish()
    assert shown == by_reading(text, stops, include)


def test_nothing_is_shown_after_a_match():
    matcher = StopMatcher(["x"])
    assert matcher.push("abxcd") == "ab"
    assert matcher.push("more") == ""
    assert matcher.matched == "x"
