from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm import DiskTier
from dynamo_kvbm._cli import main

TRACE = """{"timestamp": 0, "input_length": 1024, "hash_ids": [0, 1]}
{"timestamp": 1000, "input_length": 1536, "hash_ids": [0, 1, 2]}
{"timestamp": 2000, "input_length": 1024, "hash_ids": [0, 3]}
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    return path


def test_simulate_prints_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace), "--blocks", "2,10", "--policy", "lru,oracle"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["hit", "%", "2", "10"], ["lru", "42.86", "42.86"], ["oracle", "42.86", "42.86"]]


def test_simulate_writes_a_page_that_stands_alone(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    arguments = ["--blocks", "2,10", "--policy", "lru,arc", "--html", str(page), "--prefill-tokens-per-s", "1000"]
    assert main(["simulate", str(trace), *arguments]) == 0
    text = page.read_text()
    plot = re.search(r"<svg.*</svg>", text, re.DOTALL)
    assert plot is not None
    lines = ElementTree.fromstring(plot.group()).findall("polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2]
    assert "mean prefill, s" in text
    assert "http" not in text


def test_simulate_prints_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace), "--blocks", "10", "--policy", "lru", "--requests", "2", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["policy"], row["hit_blocks"], row["requests"], row["hit_percent"]) == ("lru", 2, 2, 40.0)


def test_simulate_a_cascade(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiers", "host=2,disk=10@5", "--policy", "lru", "--prefill-tokens-per-s", "1024"]
    assert main(["simulate", str(trace), *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # The third request finds block 0 in the host; block 3 is new.
    assert rows[2:5] == [["host", "2", "42.86"], ["disk", "10", "0.00"], ["all", "42.86"]]


def test_progress_goes_to_the_error_stream(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace), "--blocks", "10", "--policy", "lru", "--progress"]) == 0
    assert "lru 10:   0 %" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "0"], "--blocks has the value '0'"),
        (["--blocks", "many"], "--blocks has the value 'many'"),
        (["--policy", "clairvoyant"], "clairvoyant"),
        (["--tiers", "host"], "tier 'host' is not name=blocks"),
        (["--tiers", "host=1", "--policy", "oracle"], "follow one cache"),
        (["--tiers", "host=0"], "at least 1 block"),
        (["--tiers", "host=1", "--json"], "leave out --html and --json"),
        (["--requests", "-1"], "--requests has the value '-1'"),
        (["--prefill-tokens-per-s", "nan"], "--prefill-tokens-per-s"),
        (["--colour"], "--colour"),
        (["--html", "/nonexistent/x.html", "--blocks", "2", "--policy", "lru"], "--html"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["simulate", str(trace), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_inspect_tells_what_a_folder_holds_while_its_owner_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tier = DiskTier(tmp_path, 4, 4096, fingerprint="m@1")
    tier.put([BlockDescriptor(1), BlockDescriptor(2, 0, 1, 1)], [b"a" * 4096, b"b" * 4096])
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["blocks"], found["slots"], found["sequences"], found["longest_blocks"]) == (2, 4, 1, 2)
    assert found["identity"]["blocks_of"] == "m@1"
    assert found["damaged_blocks"] is None
    with (tmp_path / "0000.data").open("r+b") as file:
        file.write(b"x" * 4096)
    assert main(["inspect", str(tmp_path), "--verify"]) == 0
    assert re.search(r"damaged blocks +1", capsys.readouterr().out)
    tier.close()


def test_inspect_refuses_what_is_no_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no readable folder of a disk tier" in capsys.readouterr().err


def test_bench_shows_each_tier_beside_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--block-bytes", "4096", "--blocks", "20", "--runs", "1"]
    assert main(["bench", *sizes, "--disk", str(tmp_path), "--object", "memory:///", "--json"]) == 0
    rates = json.loads(capsys.readouterr().out)
    assert [(rate["tier"], rate["operation"]) for rate in rates] == [
        (tier, operation) for tier in ("host", "disk", "object") for operation in ("put", "get")
    ]
    assert all(rate["gb_per_s"] > 0 and rate["batch_us"] > 0 for rate in rates)
    assert [rate["limit"] for rate in rates] == ["memcpy"] * 2 + ["O_DIRECT, in order"] * 2 + [""] * 2
    assert list(tmp_path.iterdir()) == []
    assert main(["bench", *sizes]) == 0
    assert "memcpy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "0"], "--blocks has the value '0'"),
        (["--block-bytes", "64", "--blocks", "2", "--runs", "1", "--disk", "/nonesuch"], "--disk /nonesuch"),
        (["--block-bytes", "64", "--blocks", "2", "--runs", "1", "--object", "nonesuch://x"], "cannot be opened"),
    ],
)
def test_bench_names_what_it_cannot_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
