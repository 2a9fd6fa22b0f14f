"""The stock OpenAI client against `dynamo serve`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.request
from pathlib import Path

import openai
import pytest

MODEL = "tinylm"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_answers_and_counts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "Tokyo" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens > 0


def test_a_stream_gives_the_same_text_in_pieces_and_usage_at_its_end(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    prompt = [{"role": "user", "content": "Count from one to ten."}]
    whole = client.chat.completions.create(model=MODEL, messages=prompt, temperature=0, max_tokens=40)
    text = whole.choices[0].message.content or ""
    assert len(text) > 6
    stop = text[4:7]
    cut = client.chat.completions.create(model=MODEL, messages=prompt, temperature=0, max_tokens=40, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_completions_take_text_and_token_ids(client: openai.OpenAI) -> None:
    text = client.completions.create(
        model=MODEL, prompt="In the beginning God", temperature=0, max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert text.choices[0].finish_reason == "length"
    assert text.choices[0].text
    assert text.usage is not None
    assert text.usage.completion_tokens == 8
    ids = client.completions.create(
        model=MODEL, prompt=[5, 6, 7, 8], temperature=0, max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert ids.usage is not None
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (4, 4)


def test_chat_logprobs_are_probabilities_of_the_greedy_choice(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == 5
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert sum(math.exp(item.logprob) for item in entry.top_logprobs) <= 1.0001
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content


def test_completions_logprobs_have_the_older_shape(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="In the beginning God", temperature=0, max_tokens=3, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs or []) == 3


def test_a_seed_repeats_a_sample(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Tell me a story."}],
            temperature=1.0,
            seed=seed,
            max_tokens=24,
        )
        return answer.choices[0].message.content

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_errors_have_the_api_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert "nobody" in missing.value.message
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=9)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"temprature": 1})
    assert "temprature" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 5000, max_tokens=1)
    assert "4096" in long.value.message


def test_a_worker_and_a_receipt_are_named_in_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, max_tokens=1)
    assert raw.headers["x-dynamo-worker-id"]
    assert raw.headers["x-dynamo-decision-id"]
    assert raw.headers["x-request-id"]
    assert json.loads(raw.text)["model"] == MODEL


def test_a_receipt_can_be_read_and_explained(client: openai.OpenAI, serve_url: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, max_tokens=1)
    identity = raw.headers["x-dynamo-decision-id"]
    with urllib.request.urlopen(f"{serve_url}/v1/decisions/{identity}") as answer:
        kept = json.load(answer)
    assert kept["decision"]["decision_id"] == identity
    assert kept["outcome"]["finish_reason"] == "length"
    command = [str(Path(sys.executable).with_name("dynamo-router")), "explain", identity, "--url", serve_url]
    explained = subprocess.run(command, capture_output=True, text=True, check=False)
    assert explained.returncode == 0, explained.stderr
    assert f"went to worker {raw.headers['x-dynamo-worker-id']}" in explained.stdout


def test_requests_that_share_a_prefix_go_where_it_is_cached(client: openai.OpenAI) -> None:
    system = "You are a helpful guide who knows every river. " * 12
    seen: list[tuple[str, int]] = []
    for question in ("What is the capital of Japan?", "What is the capital of France?", "Count from one to five."):
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": question}],
            temperature=0,
            max_tokens=8,
        )
        usage = raw.parse().usage
        assert usage is not None
        details = usage.prompt_tokens_details
        seen.append((raw.headers["x-dynamo-worker-id"], (details.cached_tokens if details else 0) or 0))
    assert len({worker for worker, _ in seen}) == 1
    assert [cached > 64 for _, cached in seen] == [False, True, True]
