"""The command ``dynamo-planner profile``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_planner._profiler.endpoint import EndpointProbe, first_error
from dynamo_planner._profiler.page import profile_report
from dynamo_planner._profiler.simulated import SimulatedProbe
from dynamo_planner._profiler.sweep import EngineProfile, Measurement, Sweep, SweepPlan
from dynamo_planner._timing import AnalyticTiming

BAR_CHARS = 24


def add_profile_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:  # pyright: ignore[reportPrivateUsage] # argparse names the type of add_subparsers() privately
    """Add the command to a parser."""
    profile = commands.add_parser("profile", help="measure an engine over prompt length and concurrency")
    subject = profile.add_mutually_exclusive_group(required=True)
    subject.add_argument("--url", help="address of an OpenAI-compatible endpoint, for example http://host:8000")
    subject.add_argument("--mock", action="store_true", help="the simulated engine instead of a live one")
    profile.add_argument("--model", default="", help="model name; needed with --url")
    profile.add_argument("--api-key-file", type=Path, help="file with the bearer token")
    profile.add_argument("--timeout-s", type=float, default=300.0, help="limit of one request (default: 300)")
    profile.add_argument("--isl", default="128,512,2048,8192", help="prompt tokens (default: 128,512,2048,8192)")
    profile.add_argument("--concurrency", default="1,4,16,64", help="requests at once (default: 1,4,16,64)")
    profile.add_argument("--osl", type=int, default=64, help="output tokens of a request (default: 64)")
    profile.add_argument("--gpus", type=int, default=1, help="GPUs of the engine (default: 1)")
    profile.add_argument("--kv-tokens", type=int, default=1_048_576, help="KV tokens it holds (default: 1048576)")
    profile.add_argument("--speedup", type=float, default=1.0, help="of the simulated engine (default: 1)")
    profile.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    profile.add_argument("--out", type=Path, required=True, help="folder of the profile; a sweep there is resumed")
    profile.add_argument("--restart", action="store_true", help="measure anew what the folder holds")
    profile.set_defaults(run=run_profile)


def run_profile(options: argparse.Namespace) -> str:
    """Measure what is missing, write profile and report, and return a summary.

    Raises:
        ConfigurationError: for a wrong option or folder.
        DynamoError: if a measurement fails; what was measured stays.
    """
    plan = SweepPlan(
        subject="the simulated engine" if options.mock else f"{options.model} at {options.url}",
        isls=_counts("--isl", options.isl),
        concurrencies=_counts("--concurrency", options.concurrency),
        osl=options.osl,
        gpus=options.gpus,
        max_kv_tokens=float(options.kv_tokens),
        seed=options.seed,
    )
    if not options.mock and not options.model:
        raise ConfigurationError("--url needs --model, the name that the endpoint serves it under")
    profile = asyncio.run(_swept(options, Sweep(plan, options.out)))
    report = options.out / "report.html"
    report.write_text(profile_report(profile), encoding="utf-8")
    return (
        f"{len(profile.points)} points in {options.out}; plan with them: --capacity profile --profile-dir "
        f"{options.out}\nreport: {report}"
    )


async def _swept(options: argparse.Namespace, sweep: Sweep) -> EngineProfile:
    if options.mock:
        timing = AnalyticTiming(options.speedup, sweep.plan.max_kv_tokens)
        return await sweep.run(SimulatedProbe(timing, sweep.plan.osl).measure, show, restart=options.restart)
    probe = EndpointProbe(
        options.url,
        options.model,
        sweep.plan,
        clock=SystemClock(),
        api_key=_api_key(options.api_key_file),
        timeout_s=options.timeout_s,
    )
    async with probe:
        try:
            return await sweep.run(probe.measure, show, restart=options.restart)
        except BaseExceptionGroup as group:
            raise first_error(group) or group from group


def show(done: int, total: int, point: Measurement) -> None:
    """Draw the progress on standard error: one line that is redrawn on a terminal, one line a point elsewhere."""
    filled = BAR_CHARS * done // total
    bar = "#" * filled + "." * (BAR_CHARS - filled)
    text = (
        f"[{bar}] {done}/{total}  {point.isl} tokens x {point.concurrency}: "
        f"TTFT {point.ttft_ms:.1f} ms, ITL {point.itl_ms:.2f} ms, {point.output_tokens_s:.0f} tokens/s"
    )
    redrawn = sys.stderr.isatty()
    end = "\n" if done == total or not redrawn else ""
    print(("\r\x1b[K" if redrawn else "") + text, end=end, file=sys.stderr, flush=True)  # noqa: T201 - progress


def _api_key(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--api-key-file {path} cannot be read: {error}") from error


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ConfigurationError(f"{option} {text!r} is no list of numbers; give for example 128,512") from error
