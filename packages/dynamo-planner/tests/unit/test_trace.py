from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_planner._trace import Trace, load_trace

MOONCAKE = (
    '{"timestamp": 1000, "input_length": 10, "output_length": 5}\n'
    '{"timestamp": 0, "input_length": 20, "output_length": 0}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,396,109\n"
)


def test_both_formats_are_read_plain_and_gzipped(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    trace = load_trace(tmp_path / "m.jsonl")
    assert (trace.at_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == (
        [0.0, 1.0],
        [20.0, 10.0],
        [1.0, 5.0],
    )
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write(AZURE)
    azure = load_trace(tmp_path / "a.csv.gz")
    assert azure.at_s.tolist() == pytest.approx([0.0, 4.0])
    assert azure.prompt_tokens.tolist() == [374.0, 396.0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", "{}\n", "line 1"),
        ("m.jsonl", MOONCAKE + "nonsense\n", "line 3"),
        ("m.jsonl", "", "no request"),
        ("m.jsonl", '{"timestamp": 0, "input_length": -1, "output_length": 5}\n', "negative"),
        ("a.csv", "TIMESTAMP,ContextTokens\nyesterday,5\n", "line 2"),
        ("m.jsonl.gz", "plain", "cannot be read"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_trace(tmp_path / name)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_trace(tmp_path / "missing.jsonl")


def test_rates_and_means_by_interval() -> None:
    trace = Trace.of([(0, 100, 10), (5, 300, 30), (25, 50, 5)])
    assert trace.rates(10)[:3].tolist() == [0.2, 0.0, 0.1]
    prompt, output = trace.means(10)
    assert (prompt[0], output[0], prompt[2]) == (200.0, 20.0, 50.0)
    assert np.isnan(prompt[1])


def test_scaling_keeps_the_shape_and_is_repeatable() -> None:
    trace = Trace.of([(second / 2, 100, 10) for second in range(2000)])
    double = trace.scaled(2.5, seed=3)
    assert len(double) == pytest.approx(2.5 * len(trace), rel=0.03)
    assert double.rates(100)[:9] == pytest.approx(2.5 * trace.rates(100)[:9], rel=0.1)
    assert np.all(np.diff(double.at_s) >= 0)
    assert np.array_equal(double.at_s, trace.scaled(2.5, seed=3).at_s)


def test_a_day_rises_and_falls() -> None:
    trace = Trace.of([(second / 2, 100, 10) for second in range(2000)])
    day = trace.as_day(hours=10)
    assert day.duration_s == pytest.approx(10 * trace.duration_s, rel=0.01)
    rates = day.rates(trace.duration_s)
    assert rates[5] > 3 * rates[0]


def test_a_part_of_a_trace_starts_at_zero_and_an_empty_part_is_refused() -> None:
    trace = Trace.of([(0.0, 1.0, 1.0), (5.0, 2.0, 2.0), (9.0, 3.0, 3.0)])
    part = trace.between(4.0, 9.0)
    assert (part.at_s.tolist(), part.prompt_tokens.tolist()) == ([1.0], [2.0])
    with pytest.raises(ConfigurationError, match="no request between"):
        trace.between(6.0, 8.0)
