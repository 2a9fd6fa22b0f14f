"""Tables of samples in ``tests/data/parsers``: every family, every sample whole and cut everywhere.

A sample has a text and what comes out of it: a string is answer text, ``reasoning`` is reasoning, ``call`` with
``arguments`` is a finished call and with ``cut`` one that the model did not finish. ``prose`` marks text without
markup, ``quotes_markup`` text that keeps markers as content, ``open`` what the prompt says of the reasoning.
"""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.parsing import ArgumentsDelta, CallEnd, CallStart, ParserContext, TextDelta
from dynamo_frontend._parsers.chain import load_family
from dynamo_frontend._parsers.machine import MAX_BLANK, MAX_NAME

DATA = Path(__file__).parents[2] / "data" / "parsers"
TABLES = sorted(path.name.removesuffix(".json") for path in DATA.glob("*.json"))
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "rows": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
        "opt": {
            "type": "object",
            "properties": {"deep": {"type": "boolean"}, "level": {"type": "integer"}, "inner": {"type": "object"}},
        },
    },
}
TOOLS = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}}}
BARE = {"default", "llama3_json", "pythonic"}
RAW_ARGUMENTS = {
    "deepseek_v3",
    "deepseek_v3_1",
    "hermes",
    "jamba",
    "kimi_k2",
    "llama3_json",
    "mistral",
    "nemotron_deci",
}


def samples(table):
    return json.loads((DATA / f"{table}.json").read_text(encoding="utf-8"))


ALL = [pytest.param(table, sample, id=f"{table}-{sample['name']}") for table in TABLES for sample in samples(table)]


def make(table, sample):
    kind, _, name = table.partition(".")
    context = ParserContext(tools=TOOLS, reasoning_open=sample.get("open"))
    return getattr(load_family(name), kind)(context)


def run(table, sample, pieces):
    parser = make(table, sample)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return [*deltas, *parser.finish()]


def joined(deltas):
    """Return deltas in the form of the tables."""
    out = []
    name, arguments = "", ""
    for delta in deltas:
        match delta:
            case TextDelta(text=text, reasoning=reasoning):
                assert text
                last = out[-1] if out else None
                if reasoning and isinstance(last, dict) and "reasoning" in last:
                    last["reasoning"] += text
                elif not reasoning and isinstance(last, str):
                    out[-1] += text
                else:
                    out.append({"reasoning": text} if reasoning else text)
            case CallStart():
                name, arguments = delta.name, ""
            case ArgumentsDelta(text=text):
                assert name and text
                arguments += text
            case CallEnd(complete=complete):
                out.append({"call": name, ("arguments" if complete else "cut"): arguments})
                name = ""
    assert not name, "a call was left open"
    return out


def pieces_at(text, places):
    borders = [0, *sorted(places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


@pytest.mark.parametrize(("table", "sample"), ALL)
def test_whole(table, sample):
    assert joined(run(table, sample, [sample["text"]])) == sample["out"]


@pytest.mark.parametrize(("table", "sample"), ALL)
def test_cut_at_every_character(table, sample):
    text, expected = sample["text"], sample["out"]
    assert joined(run(table, sample, list(text))) == expected
    for place in range(1, len(text)):
        assert joined(run(table, sample, [text[:place], text[place:]])) == expected, place


@settings(deadline=None)
@given(data=st.data())
def test_cut_anywhere_and_joined_with_other_samples(data):
    table = data.draw(st.sampled_from(TABLES))
    texts = data.draw(st.lists(st.sampled_from([sample["text"] for sample in samples(table)]), min_size=1, max_size=3))
    text = "".join(texts)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert joined(run(table, {}, pieces_at(text, places))) == joined(run(table, {}, [text]))


@settings(deadline=None)
@given(data=st.data())
def test_any_text_is_parsed_the_same_however_cut(data):
    table = data.draw(st.sampled_from(TABLES))
    markers = sorted(load_family(table.partition(".")[2]).markers)
    pieces = st.sampled_from(
        [*markers, "{", "}", '"name"', ": ", '"', "now", "(", "a=1", ")", "[", "]", "\n", " ", "x", ","]
    )
    text = "".join(data.draw(st.lists(pieces, max_size=25)))
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert joined(run(table, {}, pieces_at(text, places))) == joined(run(table, {}, [text]))


@pytest.mark.parametrize(("table", "sample"), ALL)
def test_finished_calls_have_json_and_unfinished_ones_have_not(table, sample):
    for item in joined(run(table, sample, list(sample["text"]))):
        if isinstance(item, dict) and "arguments" in item:
            assert isinstance(json.loads(item["arguments"]), dict)
        elif isinstance(item, dict) and "cut" in item:
            with pytest.raises(ValueError):
                json.loads(item["cut"])


@pytest.mark.parametrize(("table", "sample"), ALL)
def test_no_marker_reaches_the_answer(table, sample):
    if sample.get("quotes_markup"):
        return
    family = load_family(table.partition(".")[2])
    tags = (
        family.markers - set(family.reasoning_tags) if table.startswith("tool") else set(family.reasoning_tags) - {""}
    )
    for item in sample["out"]:
        shown = item if isinstance(item, str) else item.get("reasoning", "")
        assert not [tag for tag in tags if tag in shown]


def longest_hold(table):
    """Characters that may be withheld while they may begin a marker, or a call that only its looks tell."""
    name = table.partition(".")[2]
    phrases = 40 if name == "granite" else 0
    head = 3 * MAX_NAME if name in BARE else 0
    return MAX_BLANK + max([phrases, head, *(len(marker) for marker in load_family(name).markers)])


@pytest.mark.parametrize(("table", "sample"), [param for param in ALL if param.values[1].get("prose")])
def test_prose_is_not_withheld(table, sample):
    parser = make(table, sample)
    shown = 0
    for index, char in enumerate(sample["text"]):
        shown += sum(len(delta.text) for delta in parser.feed(char))
        assert shown >= index + 1 - longest_hold(table)


@pytest.mark.parametrize("table", [table for table in TABLES if table.startswith("tool_calls")])
def test_long_prose_flows_without_delay(table):
    parser = make(table, {})
    for word in ["the", "quick", "brown", "fox", "jumps", "over", "a", "dog"] * 5:
        (delta,) = parser.feed(f" {word}")
        assert delta.text == f" {word}"


@pytest.mark.parametrize("name", sorted(RAW_ARGUMENTS))
def test_arguments_flow_as_they_come(name):
    (sample,) = [sample for sample in samples(f"tool_calls.{name}") if sample["name"] == "nested"]
    arguments = sample["out"][0]["arguments"]
    start = sample["text"].index(arguments)
    parser = make(f"tool_calls.{name}", sample)
    parser.feed(sample["text"][:start])
    for char in arguments:
        (delta,) = [delta for delta in parser.feed(char) if isinstance(delta, ArgumentsDelta)]
        assert delta.text == char


@pytest.mark.parametrize(
    "table",
    [
        "tool_calls.qwen3_coder",
        "tool_calls.minimax_m2",
        "tool_calls.deepseek_v4",
        "tool_calls.glm47",
        "tool_calls.gemma4",
    ],
)
def test_string_arguments_flow_as_they_come(table):
    (sample,) = [sample for sample in samples(table) if sample["name"] == "single"]
    parser = make(table, sample)
    parser.feed(sample["text"][: sample["text"].index("Paris")])
    shown = [delta.text for char in "Paris" for delta in parser.feed(char)]
    assert [shown[0].lstrip('"'), *shown[1:]] == list("Paris")
