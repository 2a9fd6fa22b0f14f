"""The command ``dynamo-planner``: the laboratory, and decisions in words."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dynamo_core.errors import ConfigurationError, DynamoError
from dynamo_planner._capacity import Slo
from dynamo_planner._lab import backtest as backtests
from dynamo_planner._lab import simulate as studies
from dynamo_planner._lab.fleet import FleetOptions
from dynamo_planner._lab.report import backtest_report, simulation_report
from dynamo_planner._profiler.command import add_profile_command
from dynamo_planner._record import explain, overview, read_log
from dynamo_planner._timing import AnalyticTiming
from dynamo_planner._trace import Floats, Trace, load_trace

SLO_FIELDS = {"ttft": 500.0, "itl": 50.0, "percentile": 99.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; 2 for a wrong option or file."""
    options = _parser().parse_args(argv)
    try:
        _write(options.run(options))
    except DynamoError as error:
        print(f"dynamo-planner: {error.message}", file=sys.stderr)  # noqa: T201 - the command's error output
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dynamo-planner", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    simulate = commands.add_parser("simulate", help="try the planner and its rivals on a trace")
    simulate.add_argument("trace", type=Path, help="Mooncake JSON lines or Azure CSV, also .gz")
    simulate.add_argument("--slo", default="", help="targets in ms, for example ttft=500,itl=50,percentile=99")
    simulate.add_argument("--budget", type=int, default=16, help="most GPUs (default: 16)")
    simulate.add_argument("--rate-scale", type=float, default=1.0, help="times the trace's requests (default: 1)")
    simulate.add_argument("--day", action="store_true", help="replay the trace for 24 rounds with a day's pattern")
    simulate.add_argument("--speedup", type=float, default=1.0, help="of the simulated engine (default: 1)")
    simulate.add_argument("--step-tokens", type=int, default=2048, help="prompt tokens of a step (default: 2048)")
    simulate.add_argument("--held-out", action="store_true", help="choose on the first half, judge by the second")
    simulate.add_argument("--startup-s", type=float, default=60.0, help="seconds from ask to ready (default: 60)")
    simulate.add_argument("--interval-s", type=float, default=10.0, help="seconds between decisions (default: 10)")
    simulate.add_argument("--seed", type=int, default=0, help="of the copies that scaling makes (default: 0)")
    simulate.add_argument("--html", type=Path, help="write the report there")
    simulate.set_defaults(run=_simulate)

    backtest = commands.add_parser("backtest", help="score the forecasters on a trace")
    backtest.add_argument("trace", type=Path, help="Mooncake JSON lines or Azure CSV, also .gz")
    backtest.add_argument("--interval-s", type=float, default=30.0, help="seconds of a point (default: 30)")
    backtest.add_argument("--horizon", type=int, default=3, help="points ahead (default: 3)")
    backtest.add_argument("--quantile", type=float, default=0.9, help="quantile to plan for (default: 0.9)")
    backtest.add_argument("--html", type=Path, help="write the report there")
    backtest.set_defaults(run=_backtest)

    add_profile_command(commands)

    told = commands.add_parser("explain", help="tell decisions of a log: a table of all, or all there is of one")
    told.add_argument("log", type=Path, help="file of --decision-log")
    told.add_argument("--id", type=int, help="only this decision, with everything it was made from")
    told.add_argument("--full", action="store_true", help="everything each decision was made from")
    told.add_argument("--changes", action="store_true", help="only those that changed the fleet")
    told.set_defaults(run=_explain)
    return parser


def _simulate(options: argparse.Namespace) -> str:
    if options.budget < 1 or not _positive(options.rate_scale, options.startup_s, options.interval_s):
        raise ConfigurationError("--budget, --rate-scale, --startup-s and --interval-s must be above 0")
    trace = load_trace(options.trace)
    if options.rate_scale != 1:
        trace = trace.scaled(options.rate_scale, seed=options.seed)
    if options.day:
        trace = trace.as_day(seed=options.seed)
    world = FleetOptions(
        AnalyticTiming(options.speedup, max_batched_tokens=options.step_tokens),
        parse_slo(options.slo),
        startup_s=options.startup_s,
        interval_s=options.interval_s,
        max_replicas=options.budget,
    )
    past = None
    if options.held_out:
        middle_s = trace.duration_s / 2
        past, trace = trace.between(0.0, middle_s), trace.between(middle_s, math.inf)
    study = studies.run_study(trace, world, studies.planner_settings(world, budget=options.budget), past=past)
    return _reported(options.html, studies.table(study), lambda: simulation_report(trace, study, title=_title(options)))


def _backtest(options: argparse.Namespace) -> str:
    if options.horizon < 1 or not _positive(options.interval_s) or not 0 < options.quantile < 1:
        raise ConfigurationError("--horizon must be at least 1, --interval-s above 0, --quantile between 0 and 1")
    rates = _whole_intervals(load_trace(options.trace), options.interval_s)
    scores = backtests.backtest(rates, horizon=options.horizon, quantile=options.quantile)

    def page() -> str:
        return backtest_report(rates.tolist(), options.interval_s, scores, title=_title(options))

    return _reported(options.html, backtests.table(scores), page)


def _explain(options: argparse.Namespace) -> str:
    records = [
        record
        for record in read_log(options.log)
        if options.id in (None, record.decision.decision_id)
        and not (options.changes and record.decision.replicas == record.decision.previous)
    ]
    if not records:
        raise ConfigurationError(f"no such decision in {options.log}")
    if options.id is None and not options.full:
        return overview(records)
    return "\n\n".join(explain(record) for record in records)


def parse_slo(text: str) -> Slo:
    """Read ``ttft=500,itl=50,percentile=99``; what is left out has these values.

    Raises:
        ConfigurationError: for an unknown name or a value that is no number.
    """
    values = dict(SLO_FIELDS)
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name not in values:
            raise ConfigurationError(f"--slo knows no {name!r}; give {', '.join(SLO_FIELDS)}")
        try:
            values[name] = float(number)
        except ValueError as error:
            raise ConfigurationError(f"--slo {name}={number!r} is no number of ms (or percent)") from error
    return Slo(values["ttft"] / 1000, values["itl"] / 1000, values["percentile"])


def _whole_intervals(trace: Trace, interval_s: float) -> Floats:
    return trace.rates(interval_s)[: int(trace.duration_s // interval_s)]


def _reported(path: Path | None, text: str, page: Callable[[], str]) -> str:
    if path is None:
        return text
    try:
        path.write_text(page(), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--html {path} cannot be written: {error.strerror}") from error
    return f"{text}\n\nreport: {path}"


def _title(options: argparse.Namespace) -> str:
    return f"dynamo-planner {options.run.__name__.strip('_')} {options.trace.name}"


def _positive(*values: float) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values)


def _write(text: str) -> None:
    print(text)  # noqa: T201 - the command's output
