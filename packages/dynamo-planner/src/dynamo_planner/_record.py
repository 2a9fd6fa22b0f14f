"""The decision log: each decision with what it was made from, one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Return a decision in words: what was seen, what followed, what was asked for and why."""
    decision, seen = record.decision, record.observation
    lines = [f"decision {decision.decision_id} at {decision.at_s:.0f}: {decision.reason}"]
    for role, count in decision.replicas.items():
        pool = seen.pools[role]
        lines.append(
            f"  {role}: {decision.previous[role]} -> {count}"
            f"  (ready {pool.ready}, starting {pool.starting}, draining {pool.draining}, failed {pool.failed})"
        )
    lines.append(f"  because: {decision.explanation}")
    for name, reason in decision.reasons.items():
        lines.append(f"  {name}: {reason}")
    traffic = ", ".join(f"{item.requests} requests in {item.interval_s:g} s" for item in seen.traffic) or "none"
    lines.append(f"  traffic: {traffic}; loads of {len(seen.loads)} workers; {len(seen.passes)} passes")
    if seen.stale:
        lines.append(f"  stale: {', '.join(seen.stale)}")
    lines += [f"  {name} = {value:.6g}" for name, value in sorted(decision.values.items())]
    if decision.advisory:
        lines.append("  advisory: nothing was asked of the target")
    return "\n".join(lines)
