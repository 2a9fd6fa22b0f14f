"""The request trace: a line a request, bounded, rolled over, without prompts unless asked for."""

import asyncio
import json
import stat
import threading

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_frontend._metrics import TraceMetrics
from dynamo_frontend._trace import SCHEMA, TracedRequest, TraceLog, TraceOptions


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "trace.jsonl"


@pytest.mark.parametrize("payloads", [False, True])
async def test_each_request_is_a_line(stack, path, payloads):
    stack.say("one two three")
    await stack.start(request_trace_file=str(path), request_trace_payloads=payloads)
    replies = [await stack.chat("A secret question", stream=stream) for stream in (False, True)]
    await asyncio.to_thread(stack.frontend._trace.close)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = read(path)
    ends = [line["request"] for line in lines if line["event_type"] == "request_end"]
    assert [line["schema"] for line in lines] == [SCHEMA] * len(lines)
    assert [end["request_id"] for end in ends] == [reply.headers["x-request-id"] for reply in replies]
    assert [end["stream"] for end in ends] == [False, True]
    prompt = stack.script.requests[0].token_ids
    end = ends[0]
    assert (end["model"], end["endpoint"], end["error"]) == ("tiny", "chat_completions", "")
    assert (end["input_tokens"], end["output_tokens"]) == (len(prompt) // 4, len(stack.script.output))
    assert end["worker"] == "1/0"
    assert end["decision_id"] == replies[0].headers["x-dynamo-decision-id"]
    assert end["replay"] == {
        "trace_block_size": 16,
        "input_length": len(prompt) // 4,
        "input_sequence_hashes": list(unpack_hashes(BlockHasher(16).hash_tokens(prompt).sequence)),
    }
    assert ("secret" in path.read_text()) is payloads
    assert len(lines) == (4 if payloads else 2)


async def test_failures_are_traced_with_their_reason(stack, path):
    await stack.start(request_trace_file=str(path))
    stack.script.raw = lambda request: []
    await stack.chat()
    await asyncio.to_thread(stack.frontend._trace.close)
    assert read(path)[0]["request"]["error"] == "backend.stream_incomplete"


def log_of(path, **options):
    metrics = Metrics()
    return TraceLog(TraceOptions(path, **options), TraceMetrics(metrics)), metrics.registry


def request(number, size=0):
    return TracedRequest({"request_id": f"r{number}"}, 1.5, [pack_tokens(range(64))], size)


def test_files_roll_over_and_the_oldest_goes(path):
    log, _ = log_of(path, roll_bytes=400, files=3)
    log.start()
    for number in range(60):
        log.note(request(number))
        # One at a time, so that each is a batch of its own.
        while not log._waiting.empty():
            threading.Event().wait(0.001)
    log.close()
    log.close()
    kept = sorted(path.parent.iterdir())
    assert [item.name for item in kept] == ["trace.jsonl", "trace.jsonl.1", "trace.jsonl.2"]
    assert all(item.stat().st_size <= 400 for item in kept)
    numbers = [line["request"]["request_id"] for item in reversed(kept) for line in read(item)]
    assert numbers == [f"r{number}" for number in range(60 - len(numbers), 60)]


def test_what_does_not_fit_is_dropped_and_counted(path):
    log, registry = log_of(path, capacity=5)
    for number in range(8):
        log.note(request(number))
    assert registry.get_sample_value("dynamo_frontend_trace_dropped_total") == 3
    log.start()
    log.close()
    assert len(read(path)) == 5
    assert registry.get_sample_value("dynamo_frontend_trace_written_total") == 5


def test_a_disk_that_fails_is_counted_and_does_not_stop_it(path):
    log, registry = log_of(path)
    log.start()
    path.unlink()
    path.mkdir()
    log.note(request(1))
    log.close()
    assert registry.get_sample_value("dynamo_frontend_trace_dropped_total") == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    log, _ = log_of(tmp_path / "file" / "trace.jsonl")
    with pytest.raises(ConfigurationError, match="request_trace_file"):
        log.start()
