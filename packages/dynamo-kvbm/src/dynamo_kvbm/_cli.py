"""The command ``dynamo-kvbm``: try eviction policies on a trace, look into a disk tier, measure tiers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, DynamoError
from dynamo_kvbm._lab.bench import BenchPlan, bench, bench_table
from dynamo_kvbm._lab.cascade import SimulatedTier, simulate_cascade
from dynamo_kvbm._lab.report import html_report, text_table
from dynamo_kvbm._lab.simulator import HINTED, ORACLE, Outcome, Progress, simulate
from dynamo_kvbm._lab.trace import TraceRequest, read_trace
from dynamo_kvbm._tiers.inspection import inspect_folder

DEFAULT_BLOCK_BYTES = str(2 * 1024**2)
DEFAULT_SIZES = "1000,3000,10000,30000"
DEFAULT_POLICIES = "lru,arc,s3fifo,hinted,oracle"
TIER_POLICIES = "lru,arc,s3fifo"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigurationError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, or 2 with one line of error for bad input."""
    try:
        options = _parser().parse_args(argv)
        options.run(options)
    except DynamoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output is gone; a second message about it helps nobody
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dynamo-kvbm", description="Tools of the KV block manager.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    lab = commands.add_parser("simulate", help="hit rates of eviction policies on a recorded trace")
    lab.add_argument("trace", type=Path, help="Mooncake JSONL file, plain or .gz")
    lab.add_argument("--blocks", default=DEFAULT_SIZES, help=f"cache sizes in blocks (default: {DEFAULT_SIZES})")
    lab.add_argument(
        "--policy",
        help=f"eviction orders, comma-separated; 'oracle' knows the future (default: {DEFAULT_POLICIES}; with --tiers "
        f"{TIER_POLICIES})",
    )
    lab.add_argument(
        "--tiers", help="in place of --blocks: a cascade, nearest first, such as host=3000,disk=30000@1.5 (ms a block)"
    )
    lab.add_argument("--requests", help="replay only the first N requests")
    lab.add_argument("--prefill-tokens-per-s", help="also show the mean time to compute what was not found")
    lab.add_argument("--html", type=Path, help="write a page with a plot")
    lab.add_argument("--json", action="store_true", help="print JSON in place of a table")
    lab.add_argument("--progress", action=argparse.BooleanOptionalAction, help="show progress (default: on a terminal)")
    lab.set_defaults(run=_simulate)
    look = commands.add_parser("inspect", help="what the folder of a disk tier holds")
    look.add_argument("folder", type=Path, help="a disk_dir")
    look.add_argument("--verify", action="store_true", help="read every block and compare it with its checksum")
    look.add_argument("--json", action="store_true", help="print JSON")
    look.set_defaults(run=_inspect)
    rates = commands.add_parser("bench", help="how fast the tiers of this machine are, beside memcpy and O_DIRECT")
    rates.add_argument("--block-bytes", default=DEFAULT_BLOCK_BYTES, help="size of a block (default: 2 MiB)")
    rates.add_argument("--blocks", default="128", help="blocks written and read in a run (default: 128)")
    rates.add_argument("--runs", default="5", help="measured runs (default: 5)")
    rates.add_argument("--disk", type=Path, help="a folder on the disk to measure")
    rates.add_argument("--object", help="an object store to measure, such as s3://bucket/prefix")
    rates.add_argument("--json", action="store_true", help="print JSON")
    rates.set_defaults(run=_bench)
    return parser


def _bench(options: argparse.Namespace) -> None:
    plan = BenchPlan(
        block_bytes=_positive("--block-bytes", options.block_bytes),
        blocks=_positive("--blocks", options.blocks),
        runs=_positive("--runs", options.runs),
        disk=options.disk,
        object_url=options.object,
    )
    rates = bench(plan, SystemClock())
    text = json.dumps([dataclasses.asdict(rate) for rate in rates]) if options.json else bench_table(rates)
    sys.stdout.write(text + "\n")


def _simulate(options: argparse.Namespace) -> None:
    sizes = [_positive("--blocks", part) for part in options.blocks.split(",")]
    default = DEFAULT_POLICIES if options.tiers is None else TIER_POLICIES
    policies = [part.strip() for part in (options.policy or default).split(",")]
    for policy in policies:
        if policy != ORACLE:
            plugins.load("kv_eviction", policy)
    limit = None if options.requests is None else _positive("--requests", options.requests)
    rate = _rate(options.prefill_tokens_per_s)
    trace = read_trace(options.trace, limit=limit)
    if options.tiers is not None:
        _simulate_tiers(options, trace, policies, rate)
        return
    outcomes = [
        simulate(trace, policy, size, progress=_progress(options.progress, f"{policy} {size:,}"))
        for policy in policies
        for size in sizes
    ]
    sys.stdout.write((_as_json(outcomes, rate) if options.json else text_table(outcomes, rate)) + "\n")
    if options.html is not None:
        _write(options.html, html_report(outcomes, options.trace.name, rate))


def _simulate_tiers(
    options: argparse.Namespace, trace: Sequence[TraceRequest], policies: Sequence[str], rate: float | None
) -> None:
    tiers = [SimulatedTier.parse(part) for part in options.tiers.split(",")]
    if options.html is not None or options.json:
        raise ConfigurationError("--tiers prints a table; leave out --html and --json")
    if {HINTED, ORACLE} & set(policies):
        raise ConfigurationError(f"--policy {HINTED} and {ORACLE} follow one cache; leave them out with --tiers")
    for policy in policies:
        table = simulate_cascade(trace, policy, tiers).table(rate)
        sys.stdout.write(f"{policy}\n{table}\n\n")


def _inspect(options: argparse.Namespace) -> None:
    report = dataclasses.asdict(inspect_folder(options.folder, verify=options.verify))
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    for name, value in report.items():
        shown = "not verified; add --verify" if value is None else value
        sys.stdout.write(f"{name.replace('_', ' '):<16} {shown}\n")


def _progress(wanted: bool | None, label: str) -> Progress | None:
    if not (sys.stderr.isatty() if wanted is None else wanted):
        return None

    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\r{label}: {100 * done // total:3d} %  ")
        sys.stderr.flush()

    return show


def _as_json(outcomes: Sequence[Outcome], rate: float | None) -> str:
    rows = [dataclasses.asdict(outcome) | {"hit_percent": round(outcome.hit_percent, 4)} for outcome in outcomes]
    if rate is not None:
        for row, outcome in zip(rows, outcomes, strict=True):
            row["mean_prefill_s"] = outcome.mean_prefill_s(rate)
    return json.dumps(rows)


def _positive(flag: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ConfigurationError(f"{flag} has the value {text!r}; give whole numbers of at least 1")
    return value


def _rate(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigurationError(f"--prefill-tokens-per-s has the value {text!r}; give tokens per second above 0")
    return value


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--html {path}: {error.strerror}; give a writable file") from error
