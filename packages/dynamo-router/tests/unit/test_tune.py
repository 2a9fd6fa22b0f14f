from __future__ import annotations

import json
import random

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import pack_hashes
from dynamo_router._cli import main
from dynamo_router._lab_replay import ReplayedRequest
from dynamo_router._lab_trace import TraceRequest
from dynamo_router._lab_tune import SPACES, Range, Search
from dynamo_router._pipeline import load_policy

EMPTY = pack_hashes([])
# Prompts of the second half are longer.
TRACE = [TraceRequest(float(at), 100 if at < 200 else 101, 5, EMPTY, EMPTY) for at in range(400)]


def search(cost, objective="ttft_mean", **fields):
    """A search over ``x`` from 0 to 1, where a trial's requests take as long as ``cost(x, request)`` says."""
    seen = []

    def trial(options, requests):
        seen.append((dict(options), len(requests), requests[0].at_s))
        values = [cost(options.get("x", 0.5), request) for request in requests]
        return [ReplayedRequest(value, value, 100, int(100 * value), 0, WorkerId(1)) for value in values]

    made = Search(
        trial, objective=objective, space=[Range("x", 0.0, 1.0)], candidates=27, resamples=50, seed=1, **fields
    )
    return made.run(TRACE), seen


def noisy(request):
    return random.Random(request.at_s).random()


def test_it_finds_what_is_better_and_tries_it_on_unseen_requests():
    steps = []
    found, seen = search(
        lambda x, request: 1 + (x - 0.8) ** 2 + 0.05 * noisy(request), on_trial=lambda *step: steps.append(step)
    )
    assert found.best.options["x"] == pytest.approx(0.8, abs=0.1)
    assert found.better
    assert found.change.low <= found.change.value <= found.change.high < 0
    assert [len(found.ranking), found.best.requests] == [3, 200]
    assert [count for _, count, _ in seen] == [50] * 27 + [66] * 9 + [200] * 3 + [200] * 2
    assert {at for _, _, at in seen} == {0.0}
    assert steps == [(number, 41) for number in range(1, 42)]


def test_higher_is_better_for_hits():
    found, _ = search(lambda x, request: 0.5 + 0.4 * x, objective="hit_rate")
    assert found.best.options["x"] > 0.8
    assert found.better
    assert found.change.low > 0


def test_what_only_looked_better_is_not_called_better():
    # Options matter in the half that is searched and not in the other one.
    found, _ = search(lambda x, request: 1 + (x if request.prompt_tokens == 100 else 0) + noisy(request))
    assert found.best.options["x"] < 0.2
    assert (found.change.value, found.better) == (0.0, False)
    again, _ = search(lambda x, request: 1 + abs(x - 0.5) + noisy(request))
    assert again.best.options == {}
    assert (again.change.value, again.better) == (0.0, False)


@pytest.mark.parametrize("text", ["x", "x=1", "x=2..1", "x=-1..1", "x=1..inf", "x=a..b", "x=1..1", "x=1e..2"])
def test_bad_ranges_are_refused(text):
    with pytest.raises(ConfigurationError, match=r"OPTION=LOW\.\.HIGH"):
        Range.parse(text)


def test_draws_stay_in_their_range():
    rng = random.Random(3)
    for text in ("x=0..2", "x=0.001..10"):
        each = Range.parse(text)
        drawn = [each.draw(rng) for _ in range(200)]
        assert all(each.low <= value <= each.high for value in drawn)
    assert sum(value < 0.1 for value in drawn) > 60, "small values come as often as large ones"


@pytest.mark.parametrize("policy", SPACES)
def test_the_usual_knobs_exist(policy):
    rng = random.Random(1)
    load_policy(policy, {each.option: each.draw(rng) for each in map(Range.parse, SPACES[policy])})


def test_the_command_prints_and_writes_settings(tmp_path, capsys):
    trace, output = tmp_path / "t.jsonl", tmp_path / "tuned.yaml"
    lines = [
        {"timestamp": at * 150, "input_length": 2048, "output_length": 5, "hash_ids": [0, at % 7 + 1, at % 5 + 9]}
        for at in range(240)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--workers", "2", "--candidates", "4", "--policy", "ttft", "--output", str(output), "--resamples", "20"]
    assert main(["tune", str(trace), *flags]) == 0
    out = capsys.readouterr().out
    assert "On the second half, 120 requests that the search has not seen:" in out
    assert "default options of ttft" in out
    assert out.endswith(f"wrote {output}\n")
    assert output.read_text().splitlines()[1] == 'policy: "ttft"'
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--config", str(output), "--print-config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    (shown,) = [line for line in printed if line.startswith("policy ")]
    assert shown.split()[1] == "ttft"
    assert str(output) in shown
