from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.planning import Observation, PoolState, TrafficStats
from dynamo_planner import ConstantPredictor, PlannerSettings, create_planner
from dynamo_planner._capacity import Slo
from dynamo_planner._cli import main, parse_slo
from dynamo_planner._record import DecisionLog, Record, explain, read_log


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 150 * place, "input_length": 500, "output_length": 50} for place in range(3000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record(requests: int = 300, decision_id: int = 1) -> Record:
    planner = create_planner(
        PlannerSettings(interval_s=10, throughput_interval_s=10), ConstantPredictor, first_decision_id=decision_id
    )
    pools = {"worker": PoolState(ready=1, desired=1)}
    seen = Observation(100.0, (TrafficStats("m", 10.0, requests=requests),), pools, stale=("loads",))
    return Record(planner.decide(seen), seen)


def test_simulate_prints_a_table_and_writes_a_page(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert main(["simulate", str(trace), "--budget", "4", "--slo", "ttft=800,itl=60", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    for name in ("planner", "fixed", "HPA-like", "KPA-like", "clairvoyant schedule", "lower bound"):
        assert name in text
    html = page.read_text()
    assert html.count("<svg") == 2
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "<script" not in html


def test_backtest_prints_a_table_and_writes_a_page(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert main(["backtest", str(trace), "--interval-s", "10", "--horizon", "1", "--html", str(page)]) == 0
    assert "holt-winters" in capsys.readouterr().out
    assert "<svg" in page.read_text()


def test_explain_tells_a_decision_of_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log" / "decisions.jsonl"
    log = DecisionLog(path, 10_000_000)
    log.append(record())
    log.append(record(requests=10, decision_id=2))
    assert main(["explain", str(path), "--changes"]) == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "at", "replicas", "observed/s", "predicted/s", "planned/s", "reason", "because"]
    assert set(rule) == {"-"}
    assert row.split() == [
        "1",
        "100",
        "worker",
        "1",
        "->",
        "4",
        *["30"] * 3,
        "scale_up",
        "4",
        "replicas",
        "are",
        "needed",
    ]
    assert main(["explain", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["explain", str(path), "--full"]) == 0
    assert capsys.readouterr().out.count("because:") == 2
    assert main(["explain", str(path), "--id", "1"]) == 0
    text = capsys.readouterr().out
    assert "decision 1 at 100: scale_up" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["worker"] == ["worker", "1", "->", "4", "1", "0", "0", "0", "scale_up"]
    assert lines["throughput"] == ["throughput", "scale"]
    assert lines["observed_requests_per_second"] == ["observed_requests_per_second", "30"]
    assert "stale: loads" in text
    assert "decision 2" not in text
    assert main(["explain", str(path), "--id", "9"]) == 2
    assert "no such decision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "TRACE", "--budget", "0"], "--budget"),
        (["simulate", "TRACE", "--slo", "speed=1"], "knows no 'speed'"),
        (["simulate", "TRACE", "--slo", "ttft=fast"], "is no number"),
        (["simulate", "missing.csv"], "cannot be read"),
        (["simulate", "TRACE", "--speedup", "0"], "speedup=0"),
        (["backtest", "TRACE", "--quantile", "2"], "--quantile"),
        (["backtest", "TRACE", "--interval-s", "10", "--html", "/nowhere/x.html"], "cannot be written"),
        (["explain", "missing.jsonl"], "cannot be read"),
    ],
)
def test_wrong_options_end_with_status_2_and_name_what_is_wrong(
    arguments: list[str], message: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(trace) if argument == "TRACE" else argument for argument in arguments]
    assert main(given) == 2
    assert message in capsys.readouterr().err


def test_targets_are_read_in_ms_with_defaults() -> None:
    assert parse_slo("") == Slo(0.5, 0.05, 99)
    assert parse_slo("itl=20,percentile=95") == Slo(0.5, 0.02, 95)


def test_a_log_is_bounded_and_a_half_written_end_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path, 2000)
    for number in range(1, 20):
        log.append(record(decision_id=number))
    assert path.stat().st_size <= 2000
    assert sorted(item.name for item in tmp_path.iterdir()) == ["decisions.jsonl", "decisions.jsonl.1"]
    with path.open("ab") as file:
        file.write(b'{"decision": {"deci')
    found = list(read_log(path))
    assert found[-1].decision.decision_id == 19
    assert found[-1] == record(decision_id=19)
    assert "because: 4 replicas are needed" in explain(found[-1])
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(ConfigurationError, match="line 1"):
        list(read_log(path))


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        DecisionLog(tmp_path / "file" / "log.jsonl", 1000)
