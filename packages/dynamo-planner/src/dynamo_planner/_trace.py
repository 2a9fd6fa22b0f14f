"""Recorded traffic: reading it, and stretching it to other loads."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import ConfigurationError

Floats: TypeAlias = npt.NDArray[np.float64]

JITTER_S = 1.0
HOUR_S = 3600.0
DAY_AMPLITUDE = 0.6


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        at_s: Arrival of each, seconds from the start.
        prompt_tokens: Prompt length of each.
        output_tokens: Output length of each.
    """

    at_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def duration_s(self) -> float:
        """Seconds from the start to the last arrival."""
        return float(self.at_s[-1]) if len(self) else 0.0

    @classmethod
    def of(cls, rows: Iterable[tuple[float, float, float]]) -> Trace:
        """Return the trace of (arrival, prompt, output) rows, in any order.

        Raises:
            ConfigurationError: if there are none, or a value is negative or not finite.
        """
        table = np.asarray(sorted(rows), dtype=np.float64).reshape(-1, 3)
        if not len(table):
            raise ConfigurationError("the trace holds no request")
        if not np.isfinite(table).all() or (table[:, 1:] < 0).any():
            raise ConfigurationError("the trace holds a time or a length that is negative or not finite")
        return cls(table[:, 0] - table[0, 0], np.maximum(table[:, 1], 1.0), np.maximum(table[:, 2], 1.0))

    def rates(self, interval_s: float) -> Floats:
        """Return the requests a second of each interval."""
        counts, _ = np.histogram(self.at_s, bins=self._edges(interval_s))
        return counts / interval_s

    def means(self, interval_s: float) -> tuple[Floats, Floats]:
        """Return the mean prompt and output tokens of each interval; NaN where there are no requests."""
        edges = self._edges(interval_s)
        counts, _ = np.histogram(self.at_s, bins=edges)
        prompt, _ = np.histogram(self.at_s, bins=edges, weights=self.prompt_tokens)
        output, _ = np.histogram(self.at_s, bins=edges, weights=self.output_tokens)
        with np.errstate(invalid="ignore", divide="ignore"):
            return prompt / counts, output / counts

    def between(self, start_s: float, end_s: float) -> Trace:
        """Return the requests that arrive from a start until before an end, with the start as time 0.

        Raises:
            ConfigurationError: if there are none.
        """
        first, last = np.searchsorted(self.at_s, [start_s, end_s])
        if first == last:
            raise ConfigurationError(f"the trace holds no request between {start_s:g} and {end_s:g} s")
        rows = slice(int(first), int(last))
        return Trace(self.at_s[rows] - start_s, self.prompt_tokens[rows], self.output_tokens[rows])

    def scaled(self, factor: float, *, seed: int = 0) -> Trace:
        """Return the trace with so many times its requests; copies come within a second of their original."""
        return self._repeated(np.full(len(self), factor), np.zeros(len(self)), seed)

    def as_day(self, *, hours: int = 24, seed: int = 0) -> Trace:
        """Return the trace replayed once an hour for a day, with the day's rise and fall on top of its own pattern."""
        span_s = max(self.duration_s, 1.0)
        parts: list[Trace] = []
        for hour in range(hours):
            shape = 1 - DAY_AMPLITUDE * np.cos(2 * np.pi * (hour * span_s + self.at_s) / (hours * span_s))
            parts.append(self._repeated(shape, np.full(len(self), hour * span_s), seed + hour))
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS]
        return _sorted(*columns)

    def _repeated(self, factors: Floats, shift_s: Floats, seed: int) -> Trace:
        random = np.random.default_rng(seed)
        copies = np.floor(factors + random.random(len(self))).astype(int)
        origin = np.repeat(np.arange(len(self)), copies)
        first = np.concatenate([[True], origin[1:] != origin[:-1]]) if len(origin) else np.zeros(0, dtype=bool)
        jitter = np.where(first, 0.0, random.uniform(-JITTER_S, JITTER_S, len(origin)))
        at_s = np.maximum(self.at_s[origin] + jitter, 0.0) + shift_s[origin]
        return _sorted(at_s, self.prompt_tokens[origin], self.output_tokens[origin])

    def _edges(self, interval_s: float) -> Floats:
        return np.arange(0.0, self.duration_s + 2 * interval_s, interval_s)


_COLUMNS = ("at_s", "prompt_tokens", "output_tokens")


def _sorted(at_s: Floats, prompt_tokens: Floats, output_tokens: Floats) -> Trace:
    order = np.argsort(at_s, kind="stable")
    return Trace(at_s[order], prompt_tokens[order], output_tokens[order])


def load_trace(path: Path) -> Trace:
    """Read a trace: Mooncake's JSON lines or Azure's CSV, also gzipped.

    Raises:
        ConfigurationError: if it cannot be read, with the line.
    """
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="") as lines:
            csv_like = ".csv" in path.suffixes
            return Trace.of(_azure(lines) if csv_like else _mooncake(lines))
    except OSError as error:
        raise ConfigurationError(f"trace {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, EOFError) as error:
        raise ConfigurationError(f"trace {path} is no text: {error}") from error


def _mooncake(lines: Iterable[str]) -> Iterable[tuple[float, float, float]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield float(row["timestamp"]) / 1000, float(row["input_length"]), float(row["output_length"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"line {number} of the trace is no request ({error!r}); "
                "need timestamp (ms), input_length and output_length"
            ) from error


def _azure(lines: Iterable[str]) -> Iterable[tuple[float, float, float]]:
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            # Fractions of a second have seven digits there, one more than a datetime takes.
            whole, _, fraction = row["TIMESTAMP"].partition(".")
            at_s = datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")
            yield at_s, float(row["ContextTokens"]), float(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"line {number} of the trace is no request ({error!r}); "
                "need TIMESTAMP, ContextTokens and GeneratedTokens"
            ) from error
