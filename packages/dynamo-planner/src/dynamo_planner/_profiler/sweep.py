"""The sweep: which points are measured, which are done already, and the profile they make.

``points.jsonl`` holds a header and one line a measured point, so that a sweep that was cut off goes on where it was.
``profile.json`` is the whole profile with its schema. ``prefill_raw_data.json`` and ``decode_raw_data.json`` are the
interpolation files that ``--capacity profile`` reads.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigurationError

SCHEMA = "dynamo.engine_profile.v1"
POINTS_FILE = "points.jsonl"


class SweepPlan(msgspec.Struct, frozen=True):
    """What a sweep measures; a sweep goes on only with the plan that it began with.

    Attributes:
        subject: Engine that is measured, in words: its address and model.
        isls: Prompt lengths, in tokens.
        concurrencies: Requests that run at once.
        osl: Output tokens of each request.
        gpus: GPUs of the engine.
        max_kv_tokens: KV tokens that it holds.
        seed: Of the prompts.
    """

    subject: str
    isls: tuple[int, ...]
    concurrencies: tuple[int, ...]
    osl: int = 64
    gpus: int = 1
    max_kv_tokens: float = 1_048_576
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (*self.isls, *self.concurrencies, self.gpus, self.max_kv_tokens)
        if not self.isls or not self.concurrencies or min(counts) < 1 or self.osl < 2:
            raise ConfigurationError(
                f"a sweep needs prompt lengths, concurrencies, GPUs and KV tokens of at least 1 and an output of at "
                f"least 2 tokens, got {self}"
            )


class Measurement(msgspec.Struct, frozen=True):
    """What one point of a sweep gave.

    Attributes:
        isl: Prompt tokens.
        concurrency: Requests at once.
        ttft_ms: Mean time to first token.
        itl_ms: Mean inter-token latency.
        output_tokens_s: Output tokens a second of all requests together.
    """

    isl: int
    concurrency: int
    ttft_ms: float
    itl_ms: float
    output_tokens_s: float


class EngineProfile(msgspec.Struct, frozen=True):
    """A profile as it is written.

    Attributes:
        schema: Version of this layout.
        plan: What was measured.
        points: What it gave.
    """

    schema: str
    plan: SweepPlan
    points: tuple[Measurement, ...]


Measure = Callable[[int, int], Awaitable[Measurement]]
"""Measures one prompt length at one concurrency."""

Progress = Callable[[int, int, Measurement], None]
"""Takes how many points are done, of how many, and the newest."""


@dataclass
class Sweep:
    """One sweep and its folder.

    Attributes:
        plan: What is measured.
        folder: Where results go.
    """

    plan: SweepPlan
    folder: Path

    async def run(self, measure: Measure, progress: Progress, *, restart: bool = False) -> EngineProfile:
        """Measure what is not measured yet, and write the profile.

        Cancellation keeps the points that are done; the next run goes on after them.

        Raises:
            ConfigurationError: if the folder holds another sweep, or cannot be written.
            DynamoError: if a measurement fails.
        """
        done = {} if restart else self._resumed()
        wanted = [(isl, concurrency) for isl in self.plan.isls for concurrency in self.plan.concurrencies]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Written anew, without the half line that a killed process may have left at the end.
            begun = [msgspec.json.encode(item) + b"\n" for item in (self.plan, *done.values())]
            (self.folder / POINTS_FILE).write_bytes(b"".join(begun))
            for point in wanted:
                if point not in done:
                    done[point] = await measure(*point)
                    with (self.folder / POINTS_FILE).open("ab") as lines:
                        lines.write(msgspec.json.encode(done[point]) + b"\n")
                    progress(len(done), len(wanted), done[point])
            profile = EngineProfile(SCHEMA, self.plan, tuple(done[point] for point in wanted))
            self._write(profile)
        except OSError as error:
            raise ConfigurationError(f"profile folder {self.folder} cannot be written: {error}") from error
        return profile

    def _resumed(self) -> dict[tuple[int, int], Measurement]:
        """Return the points of a sweep that was cut off, if it is this one.

        Raises:
            ConfigurationError: if the folder holds the points of another.
        """
        path = self.folder / POINTS_FILE
        if not path.is_file():
            return {}
        try:
            head, *lines = path.read_bytes().splitlines()
            begun = msgspec.json.decode(head, type=SweepPlan)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} is no sweep: {error}; give --restart to measure anew") from error
        if begun != self.plan:
            raise ConfigurationError(
                f"{self.folder} holds another sweep ({begun}); give --restart to measure anew, or another --out"
            )
        return {(point.isl, point.concurrency): point for point in map(_whole, lines) if point is not None}

    def _write(self, profile: EngineProfile) -> None:
        (self.folder / "profile.json").write_bytes(msgspec.json.format(msgspec.json.encode(profile)))
        (self.folder / "prefill_raw_data.json").write_text(json.dumps(_prefill(profile)), encoding="utf-8")
        (self.folder / "decode_raw_data.json").write_text(json.dumps(_decode(profile)), encoding="utf-8")


def _whole(line: bytes) -> Measurement | None:
    """Return the point of a line, None for the half of one that a killed process left."""
    try:
        return msgspec.json.decode(line, type=Measurement)
    except msgspec.MsgspecError:
        return None


def _prefill(profile: EngineProfile) -> dict[str, Sequence[float]]:
    """Return the interpolation data of prompts: those of the least concurrency, which queue least."""
    least = min(profile.plan.concurrencies)
    points = sorted((point for point in profile.points if point.concurrency == least), key=lambda point: point.isl)
    return {
        "prefill_isl": [point.isl for point in points],
        "prefill_ttft": [point.ttft_ms for point in points],
        "prefill_thpt_per_gpu": [
            least * point.isl / max(point.ttft_ms, 1e-6) * 1000 / profile.plan.gpus for point in points
        ],
    }


def _decode(profile: EngineProfile) -> dict[str, Sequence[float] | float]:
    plan = profile.plan
    contexts = [point.isl + plan.osl / 2 for point in profile.points]
    pairs = list(zip(profile.points, contexts, strict=True))
    return {
        "x_kv_usage": [min(1.0, point.concurrency * context / plan.max_kv_tokens) for point, context in pairs],
        "y_context_length": contexts,
        "z_itl": [point.itl_ms for point in profile.points],
        "z_thpt_per_gpu": [point.output_tokens_s / plan.gpus for point in profile.points],
        "max_kv_tokens": plan.max_kv_tokens,
    }
