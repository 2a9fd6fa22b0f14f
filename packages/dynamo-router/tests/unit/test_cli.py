from __future__ import annotations

import json

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import WorkerId
from dynamo_router._cli import main
from dynamo_router._lab_command import parse_policy
from dynamo_router._lab_replay import ReplayedRequest
from dynamo_router._lab_stats import Gate, percentile, summarize


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [
        {"timestamp": at * 200, "input_length": 2048, "output_length": 5, "hash_ids": [0, at % 4 + 1, at % 4 + 9]}
        for at in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_replay_prints_a_table_and_writes_a_report(trace, tmp_path, capsys):
    report = tmp_path / "r.html"
    flags = ["--workers", "2", "--policy", "ttft", "--policy", "kv:prefill_scale=8", "--report-html", str(report)]
    assert main(["replay", str(trace), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["policy", "hit_rate"]
    assert [line.split()[0] for line in lines[1:]] == ["ttft", "kv:prefill_scale=8"]
    page = report.read_text()
    assert "t.jsonl: 60 requests on 2 workers" in page
    assert page.count("<polyline") == 2


def test_replay_prints_json_and_fails_its_gates(trace, capsys):
    flags = ["--workers", "2", "--policy", "ttft,random", "--json-lines", "--fail-if", "hit_rate < -5%"]
    assert main(["replay", str(trace), *flags]) == 1
    out = capsys.readouterr().out.splitlines()
    first = json.loads(out[0])
    assert (first["policy"], first["requests"]) == ("ttft", 60)
    assert first["hit_rate"]["low"] <= first["hit_rate"]["value"] <= first["hit_rate"]["high"]
    assert out[2].startswith("FAILED random: hit_rate changed by -")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["replay"], "give the trace file"),
        (["replay", "missing.jsonl"], "cannot be read"),
        (["replay", "TRACE", "--policy", "kw"], "kw"),
        (["replay", "TRACE", "--policy", "kv:temperature"], "needs a value"),
        (["replay", "TRACE", "--policy", "kv:temprature=1"], "temprature"),
        (["replay", "TRACE", "--workers", "0"], "--workers"),
        (["replay", "TRACE", "--fail-if", "ttft > 3"], "--fail-if"),
        (["replay", "TRACE", "--wrokers", "2"], "did you mean --workers"),
        (["replay", "TRACE", "--policy", "ttft", "--report-html", "/nowhere/r.html"], "cannot be written"),
        (["tune"], "give the trace file"),
        (["tune", "TRACE"], "give one of 100"),
        (["tune", "TRACE", "--policy", "random"], "nothing is known to vary in policy 'random'"),
        (["tune", "TRACE", "--objective", "ttft"], "--objective"),
        (["tune", "TRACE", "--vary", "decode_weight=3..1"], "--vary"),
        (["serve", "--policy", "kw"], "kw"),
        (["serve", "--host", "256.0.0.1"], "cannot listen"),
        (["explain"], "give the decision's id"),
        (["dance"], "no command 'dance'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(trace, argv, message, capsys):
    assert main([str(trace) if word == "TRACE" else word for word in argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "replay TRACE" in capsys.readouterr().out
    for command in ("replay", "serve", "explain"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
    assert main(["explain", "x", "--url", "http://127.0.0.1:9"]) == 1


def test_policies_are_read_with_options():
    assert parse_policy("kv:temperature=0.5:track_prefill=false") == (
        "kv",
        {"temperature": 0.5, "track_prefill": False},
    )
    assert parse_policy("slo:among_good=pack") == ("slo", {"among_good": "pack"})


def result(ttft):
    return ReplayedRequest(ttft, ttft + 1, 100, 50, 50, WorkerId(1))


def test_figures_and_gates():
    assert percentile([3, 1, 2, 4], 0.5) == 3
    assert percentile([1], 0.99) == 1
    slow = summarize([result(float(n)) for n in range(1, 101)], resamples=50, seed=1)
    assert slow["ttft_mean"].value == 50.5
    assert slow["ttft_mean"].low < 50.5 < slow["ttft_mean"].high
    assert slow["hit_rate"].value == slow["hit_rate"].low == 0.5
    assert summarize([result(1.0)], resamples=0, seed=1)["ttft_p99"].low == 1.0
    fast = summarize([result(float(n) / 2) for n in range(1, 101)], resamples=5, seed=1)
    gate = Gate.parse("ttft_mean > +3%")
    assert gate.failure("x", fast, slow) == "x: ttft_mean changed by +100.0%, limit +3.0%"
    assert gate.failure("x", slow, fast) == ""
    assert Gate.parse("ttft_p99<-40.5%").failure("x", slow, fast)
    with pytest.raises(ConfigurationError):
        Gate.parse("nonsense > 3%")
