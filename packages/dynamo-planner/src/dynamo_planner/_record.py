"""The decision log: each decision with what it was made from, one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_core.planning import Observation, ScalingDecision


class Record(msgspec.Struct, frozen=True):
    """One line of the log.

    Attributes:
        decision: What was decided.
        observation: What it was decided from.
    """

    decision: ScalingDecision
    observation: Observation


class DecisionLog:
    """Appends records to a file; at its limit the file becomes ``.1`` and starts anew, so two files bound the space.

    Args:
        path: The file; its folder is made.
        max_bytes: Size at which it starts anew.

    Raises:
        ConfigurationError: if it cannot be written.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._encoder = msgspec.json.Encoder()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._size = path.stat().st_size if path.exists() else 0
            path.open("ab").close()
        except OSError as error:
            raise ConfigurationError(f"decision log {path} cannot be written: {error.strerror}") from error

    def append(self, record: Record) -> None:
        """Write one record. Raises ``OSError`` if the disk refuses."""
        line = self._encoder.encode(record) + b"\n"
        if self._size and self._size + len(line) > self._max_bytes:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._size = 0
        with self._path.open("ab") as file:
            file.write(line)
        self._size += len(line)


def read_log(path: Path) -> Iterator[Record]:
    """Yield the records of a log; a half-written last line ends it.

    Raises:
        ConfigurationError: if the file cannot be read or another line is no record.
    """
    decoder = msgspec.json.Decoder(Record)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigurationError(f"decision log {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError as error:
            if number == len(lines):
                return
            raise ConfigurationError(f"line {number} of decision log {path} is no decision: {error}") from error


def explain(record: Record) -> str:
    """Return a decision in words and numbers: what was seen, what followed, what was asked for and why."""
    decision, seen = record.decision, record.observation
    lines = [f"decision {decision.decision_id} at {decision.at_s:.0f}: {decision.reason}"]
    roles: list[tuple[str, ...]] = []
    for role, count in decision.replicas.items():
        pool = seen.pools[role]
        change = f"{decision.previous[role]} -> {count}"
        states = (pool.ready, pool.starting, pool.draining, pool.failed)
        roles.append((role, change, *map(str, states), decision.reasons.get(role, "")))
    if roles:
        lines += _columns(("role", "replicas", "ready", "starting", "draining", "failed", "reason"), roles)
    lines.append(f"  because: {decision.explanation}")
    parts = [(name, reason) for name, reason in decision.reasons.items() if name not in decision.replicas]
    if parts:
        lines += _columns(("part", "reason"), parts)
    traffic = ", ".join(f"{item.requests} requests in {item.interval_s:g} s" for item in seen.traffic) or "none"
    lines.append(f"  traffic: {traffic}; loads of {len(seen.loads)} workers; {len(seen.passes)} passes")
    if seen.stale:
        lines.append(f"  stale: {', '.join(seen.stale)}")
    if decision.values:
        lines += _columns(("value", ""), [(name, f"{value:.6g}") for name, value in sorted(decision.values.items())])
    if decision.advisory:
        lines.append("  advisory: nothing was asked of the target")
    return "\n".join(lines)


def overview(records: Sequence[Record]) -> str:
    """Return decisions as a table, one a line: what was seen, planned and asked for, and why."""
    rows = [
        (
            str(record.decision.decision_id),
            f"{record.decision.at_s:.0f}",
            _changes(record.decision),
            *(_number(record.decision.values.get(f"{name}_requests_per_second")) for name in _RATES),
            record.decision.reason,
            record.decision.explanation + (" (advisory)" if record.decision.advisory else ""),
        )
        for record in records
    ]
    head = ("id", "at", "replicas", *(f"{name}/s" for name in _RATES), "reason", "because")
    return "\n".join(line.removeprefix("  ") for line in _columns(head, rows))


_RATES = ("observed", "predicted", "planned")


def _changes(decision: ScalingDecision) -> str:
    return ", ".join(
        f"{role} {count}"
        if decision.previous.get(role) == count
        else f"{role} {decision.previous.get(role)} -> {count}"
        for role, count in decision.replicas.items()
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _columns(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return lines of a table, each column as wide as its widest cell."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return [lines[0], "  " + "-" * (max(map(len, lines)) - 2), *lines[1:]]
