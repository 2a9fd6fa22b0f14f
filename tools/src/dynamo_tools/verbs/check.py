"""``dyn check``: run the gates."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

from dynamo_tools.finding import Finding
from dynamo_tools.gates import GATES, Gate, agents
from dynamo_tools.table import table
from dynamo_tools.workspace import Workspace

NAME = "check"
SUMMARY = "run the gates; each finding is a line path:line: gate: message"
_WORKERS = 3


@dataclass(frozen=True)
class Outcome:
    """What one gate found and how long it took."""

    gate: str
    findings: list[Finding]
    seconds: float

    @property
    def failures(self) -> int:
        """Findings that fail the gate."""
        return sum(finding.fails for finding in self.findings)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    gates = "; ".join(f"{gate.name}: {gate.summary}" for gate in GATES)
    parser.add_argument("gates", nargs="*", metavar="GATE", type=_name, help=f"{gates}; agents: names exist")
    parser.add_argument("--quiet", action="store_true", help="leave notes and the table out")


def main(workspace: Workspace, arguments: argparse.Namespace) -> int:
    """Run the gates that are named, or all."""
    wanted = set(arguments.gates)
    outcomes = run_gates(workspace, [gate for gate in all_gates() if not wanted or gate.name in wanted])
    for finding in sorted(finding for outcome in outcomes for finding in outcome.findings):
        if finding.fails or not arguments.quiet:
            print(finding)
    failed = sum(outcome.failures for outcome in outcomes)
    if not arguments.quiet:
        print(summary(outcomes))
    return 1 if failed else 0


def all_gates() -> list[Gate]:
    """Every gate, ``agents`` included."""
    from dynamo_tools.cli import explain_arguments

    names = Gate(agents.GATE, lambda workspace: agents.check(workspace, explain_arguments), "names exist")
    return [*GATES, names]


def run_gates(workspace: Workspace, gates: Sequence[Gate]) -> list[Outcome]:
    """Run gates side by side; the heavy ones are processes of their own."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(_run, repeat(workspace), gates))


def summary(outcomes: Sequence[Outcome]) -> str:
    """Table of gates with their findings and seconds."""
    rows = [
        (outcome.gate, "ok" if not outcome.failures else f"{outcome.failures} findings", f"{outcome.seconds:.1f} s")
        for outcome in sorted(outcomes, key=lambda outcome: outcome.gate)
    ]
    return table(("gate", "result", "time"), rows)


def _name(text: str) -> str:
    names = [*(gate.name for gate in GATES), agents.GATE]
    if text not in names:
        raise argparse.ArgumentTypeError(f"no gate {text!r}; there are {', '.join(sorted(names))}")
    return text


def _run(workspace: Workspace, gate: Gate) -> Outcome:
    started = time.monotonic()
    findings = list(gate.check(workspace))
    return Outcome(gate.name, findings, time.monotonic() - started)
