"""Tool calls while they are written: streamed replies equal whole ones, wherever the text was cut."""

import json
from types import SimpleNamespace

import pytest

from dynamo_core.enums import FinishReason
from dynamo_core.parsing import ParserContext
from dynamo_core.requests import Usage
from dynamo_frontend._anthropic.writers import MessageStream, MessageWriter
from dynamo_frontend._openai.stream import ChatStream, ReplyHead, StreamUsage
from dynamo_frontend._openai.whole import ChatWhole
from dynamo_frontend._parsers.chain import ParserChain, load_reasoning_parser, load_tool_parser
from dynamo_frontend._parsers.forced import forced_calls
from dynamo_frontend._reply import ChoiceText, Reply
from dynamo_frontend._responses.writer import ResponseWriter

WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Åå\\n"}}\n</tool_call>'
TIME = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
TEXTS = {
    "one call": f"<think>why</think>So. {WEATHER}",
    "two calls and text": f"{WEATHER}\n{TIME} done",
    "cut off": WEATHER[:-20],
    "no call": "<think>why</think>So.",
}


class Response:
    """Records what a writer sends."""

    writable = True

    def __init__(self):
        self.started = False
        self.body = b""

    def start(self, status, content_type, headers):
        self.started = True

    def write(self, data):
        self.body += data

    def send(self, status, body, content_type, headers):
        self.body = body

    def end(self):
        pass

    @property
    def events(self):
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class Characters:
    """Detokenises code points."""

    def push(self, token_ids):
        return "".join(map(chr, token_ids))

    def finish(self):
        return ""


def hermes():
    context = ParserContext()
    return ParserChain(load_reasoning_parser("basic")(context), load_tool_parser("hermes")(context))


def play(make_writer, pieces, parser=hermes, *, single_call=False):
    response = Response()
    head = ReplyHead("id-1", 5, "m", dict)
    choice = ChoiceText(Characters(), None, parser(), single_call=single_call)
    reply = Reply([choice], make_writer(response, head), lambda error: None)
    reply.generations = [SimpleNamespace(usage=Usage(3, 4, 0, 0), cancel=lambda: None)]
    sink = reply.sink(0, 1)
    for piece in pieces:
        stop = sink.tokens(0, list(map(ord, piece)), ())
        sink.flush()
        if stop is not None:
            break
    sink.finished(0, FinishReason.EOS)
    sink.flush()
    sink.done(Usage())
    return response


def chat_whole(pieces, parser=hermes, **options):
    choice = json.loads(play(lambda r, h: ChatWhole(r, h, 1, None), pieces, parser, **options).body)["choices"][0]
    return choice["message"], choice["finish_reason"]


def chat_streamed(pieces, parser=hermes, **options):
    message, reason = {"role": "assistant", "content": ""}, None
    calls = []
    stream = play(lambda r, h: ChatStream(r, h, StreamUsage(), None), pieces, parser, **options)
    for event in stream.events:
        (choice,) = event["choices"]
        delta = choice["delta"]
        message["content"] += delta.get("content", "")
        if "reasoning_content" in delta:
            message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({key: value for key, value in call.items() if key != "index"})
            else:
                assert set(call["function"]) == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    if calls:
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    return message, reason


def anthropic_whole(pieces):
    return json.loads(play(MessageWriter, pieces).body)["content"]


def anthropic_streamed(pieces):
    blocks, arguments = [], ""
    for event in play(lambda r, h: MessageStream(r, h, Usage), pieces).events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            arguments = ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            kind = delta["type"].removesuffix("_delta")
            if kind == "input_json":
                arguments += delta["partial_json"]
            else:
                blocks[-1][kind] += delta[kind]
        elif event["type"] == "content_block_stop" and blocks[-1]["type"] == "tool_use":
            blocks[-1]["input"] = read(arguments)
    return blocks


def read(arguments):
    try:
        return json.loads(arguments)
    except ValueError:
        return {"arguments": arguments}


def responses_whole(pieces):
    return json.loads(play(lambda r, h: ResponseWriter(r, h, {}, stream=False), pieces).body)["output"]


def responses_streamed(pieces):
    """The output from the events of its items alone, checked against the object that ends the stream."""
    found, texts = [], []
    events = play(lambda r, h: ResponseWriter(r, h, {}, stream=True), pieces).events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        match event["type"].split("."):
            case ["response", "output_item", "added"]:
                assert event["item"].get("arguments", "") == ""
                texts.append("")
            case ["response", _, "delta"]:
                texts[event["output_index"]] += event["delta"]
            case ["response", "function_call_arguments", "done"]:
                assert event["arguments"] == texts[event["output_index"]]
            case ["response", "output_item", "done"]:
                item = event["item"]
                shown = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
                assert shown == texts[event["output_index"]]
                found.append(item)
    assert events[-1]["response"]["output"] == found
    return found


FORMS = {
    "chat": (chat_whole, chat_streamed),
    "anthropic": (anthropic_whole, anthropic_streamed),
    "responses": (responses_whole, responses_streamed),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TEXTS)
def test_streams_equal_whole_replies_at_every_split(form, name):
    whole, streamed = FORMS[form]
    text = TEXTS[name]
    expected = whole([text])
    for place in range(len(text) + 1):
        pieces = [text[:place], text[place:]]
        assert whole(pieces) == expected
        assert streamed(pieces) == expected
    assert streamed(text) == expected


def test_arguments_leave_while_they_are_written():
    text = TEXTS["one call"]
    events = play(lambda r, h: ChatStream(r, h, StreamUsage(), None), text).events
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert len(calls) > 10
    assert all(set(call) == {"index", "function"} for call in calls[1:])


def test_forced_calls_are_streamed_as_they_are_read():
    text = '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'
    expected = chat_whole([text], forced_calls)
    assert [call["function"]["name"] for call in expected[0]["tool_calls"]] == ["f", "g"]
    assert chat_streamed(text, forced_calls) == expected


def test_a_single_call_ends_the_choice_behind_its_arguments():
    text = f"{WEATHER}{TIME}"
    message, reason = chat_streamed(text, single_call=True)
    assert (message, reason) == chat_whole([text], single_call=True)
    assert reason == "tool_calls"
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]


def test_a_call_that_was_cut_off_is_shown_as_incomplete():
    item = responses_whole([TEXTS["cut off"]])[0]
    assert (item["type"], item["status"]) == ("function_call", "incomplete")
    assert anthropic_whole([TEXTS["cut off"]])[0]["input"] == {"arguments": item["arguments"]}
