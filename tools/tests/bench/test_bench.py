import dataclasses
import json
import os
import sys

import pytest

from dynamo_tools.bench import Options, load, report
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.measure import cpu_seconds, cpu_us_per_call, repeat
from dynamo_tools.bench.rivals import Rival, install, measure


def test_a_figure_has_exactly_the_fields_that_are_promised():
    figure = Figure.of("x", [3.0, 1.0, 2.0], unit="s", better="lower")
    assert dataclasses.asdict(figure) == {
        "figure": "x",
        "value": 2.0,
        "unit": "s",
        "better": "lower",
        "rival": None,
        "rival_value": None,
        "limit_value": None,
        "runs": 3,
        "min": 1.0,
        "max": 3.0,
    }


def test_json_has_one_object_a_line():
    figures = [Figure.of(name, [1.0], unit="s", better="lower") for name in ("a", "b")]
    assert [json.loads(line)["figure"] for line in report.json_lines(figures).splitlines()] == ["a", "b"]


def test_the_table_shows_what_is_missing_as_a_dash():
    lines = report.text([Figure.of("a", [1.0], unit="s", better="lower", rival="b")]).splitlines()
    assert lines[2].split() == ["a", "1", "1", "…", "1", "s", "lower", "1", "b", "-", "-"]


def test_cpu_seconds_counts_this_process():
    before = cpu_seconds([os.getpid()])
    cpu_us_per_call(lambda: sum(range(1000)), 5000)
    assert cpu_seconds([os.getpid()]) > before


def test_cpu_seconds_of_a_process_that_is_gone_is_an_error():
    with pytest.raises(ProcessLookupError, match="process 2147483646 is gone"):
        cpu_seconds([2**31 - 2])


def test_the_first_run_only_warms_up():
    values = iter([100.0, 1.0, 2.0])
    assert repeat(lambda: next(values), 2) == [1.0, 2.0]


def test_a_rival_that_cannot_be_installed_is_null_and_said_so(tmp_path, capsys):
    rival = Rival("nobody", (str(tmp_path / "no-such-wheel.whl"),))
    assert measure(rival, tmp_path / "cache", "print(1)") is None
    assert "nobody cannot be installed, its value is null" in capsys.readouterr().err


def test_an_installed_rival_is_measured_by_its_median_and_kept(tmp_path):
    rival = Rival("empty", ())
    cache = tmp_path / "cache"
    folder = cache / "empty"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / ".ready").write_text("", encoding="utf-8")
    assert install(rival, cache) == folder / "bin" / "python"
    assert measure(rival, cache, "print(3)\nprint(1)\nprint(2)") == 2.0


def test_a_rival_that_fails_is_null(tmp_path, capsys):
    folder = tmp_path / "cache" / "empty"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / ".ready").write_text("", encoding="utf-8")
    assert measure(Rival("empty", ()), tmp_path / "cache", "raise SystemExit('broken')") is None
    assert "empty failed, its value is null: broken" in capsys.readouterr().err


def test_an_unknown_benchmark_lists_those_that_exist():
    with pytest.raises(LookupError, match="no benchmark 'nothing'; there are runtime"):
        load("nothing")


def test_options_make_a_quick_run_short(tmp_path):
    assert Options(tmp_path, quick=True).runs < Options(tmp_path).runs
    assert Options(tmp_path).cache == tmp_path / ".bench-cache"
