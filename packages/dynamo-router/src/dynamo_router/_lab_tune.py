"""Searches a policy's options on one half of a trace, and tries what it found on the other.

Random draws compete by successive halving: all on a short beginning of the first half, the better third on three times
as much, and so on. The winner meets the default options on the second half, which the search has not seen; resampling
the same requests of both gives the interval of their difference.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_router._lab_replay import ReplayedRequest
from dynamo_router._lab_stats import FIGURES, Estimate, percentile
from dynamo_router._lab_trace import TraceRequest

HIGHER_IS_BETTER = frozenset({"hit_rate"})
SPACES: Mapping[str, tuple[str, ...]] = {
    "ttft": ("decode_weight=0.002..0.2", "overlap_weight=0..1.5"),
    "kv": ("overlap_credit=0.2..4", "credit_decay=0..2", "prefill_scale=0.2..20", "active_request_weight=0..20"),
    "weighted": ("prefix=0.2..10", "queue=0.2..10", "kv=0.2..10", "cold_turn=0.2..10"),
    "slo": ("ttft_s=0.2..5", "decode_weight=0.002..0.2", "overlap_weight=0..1.5"),
}
"""What is varied if the caller names nothing, by policy."""
_SHRINK = 3
_FINALISTS = 3
_LEAST_REQUESTS = 50
_RANGE = re.compile(r"\s*(\w+)\s*=\s*([0-9.eE+-]+?)\.\.([0-9.eE+-]+)\s*")

Trial = Callable[[Mapping[str, float], Sequence[TraceRequest]], list[ReplayedRequest]]
"""Replays requests under options; returns what became of each."""


class Range(msgspec.Struct, frozen=True):
    """Values that one option may take; drawn evenly on a logarithmic scale if ``low`` is above zero."""

    option: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read ``option=low..high``.

        Raises:
            ConfigurationError: if it is not of that form or empty.
        """
        found = _RANGE.fullmatch(text)
        try:
            made = cls(found[1], float(found[2]), float(found[3])) if found else None
        except ValueError:
            made = None
        if made is None or not 0 <= made.low < made.high < math.inf:
            raise ConfigurationError(f"--vary {text!r} is not OPTION=LOW..HIGH with 0 <= LOW < HIGH")
        return made

    def draw(self, rng: random.Random) -> float:
        """Return a value, to three significant digits."""
        if self.low > 0:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return float(f"{value:.3g}")


class Candidate(msgspec.Struct, frozen=True):
    """Options and how they did last.

    Attributes:
        options: Options by name; empty for the defaults.
        value: The objective on the part of the trace that they saw last.
        requests: How long that part was.
    """

    options: dict[str, float]
    value: float = math.nan
    requests: int = 0


class Tuned(msgspec.Struct, frozen=True):
    """Outcome of a search.

    Attributes:
        best: The winner, with its value on the second half.
        default: The default options, with theirs.
        change: Relative change from default to winner on the second half, with its 95 % interval.
        better: Whether the whole interval is on the better side; if not, the defaults are as good.
        ranking: Everyone who saw the whole first half, best first.
    """

    best: Candidate
    default: Candidate
    change: Estimate
    better: bool
    ranking: tuple[Candidate, ...]


class Search:
    """One search.

    Args:
        trial: Replays.
        objective: Name of the figure to improve.
        space: What may vary.
        candidates: How many options compete, the defaults among them.
        resamples: Resamples for the interval.
        seed: Seed of draws and resamples.
        on_trial: Hears of each replay before it runs: number, total.
    """

    def __init__(  # noqa: PLR0913 - keyword-only parts of one experiment
        self,
        trial: Trial,
        *,
        objective: str,
        space: Sequence[Range],
        candidates: int,
        resamples: int,
        seed: int,
        on_trial: Callable[[int, int], None] | None = None,
    ) -> None:
        self._trial = trial
        self._figure = FIGURES[objective]
        self._sign = -1.0 if objective in HIGHER_IS_BETTER else 1.0
        self._space = space
        self._candidates = candidates
        self._resamples = resamples
        self._rng = random.Random(seed)
        self._on_trial = on_trial
        self._tried = 0
        self._total = 0

    def run(self, trace: Sequence[TraceRequest]) -> Tuned:
        """Search on the first half of a trace and compare on the second.

        Raises:
            ConfigurationError: for too short a trace, or options that the policy refuses.
        """
        middle = len(trace) // 2
        if middle < _LEAST_REQUESTS:
            raise ConfigurationError(
                f"a trace of {len(trace)} requests cannot be tuned on; give one of {2 * _LEAST_REQUESTS} or more"
            )
        seen, held_out = trace[:middle], _from_zero(trace[middle:])
        drawn = [{each.option: each.draw(self._rng) for each in self._space} for _ in range(self._candidates - 1)]
        ranking = self._halve([Candidate({}), *map(Candidate, drawn)], seen)
        return self._compare(ranking, held_out)

    def _halve(self, field: list[Candidate], seen: Sequence[TraceRequest]) -> list[Candidate]:
        rounds = max(math.floor(math.log(len(field) / _FINALISTS, _SHRINK)), 0)
        sizes = [max(len(seen) // _SHRINK ** (rounds - number), _LEAST_REQUESTS) for number in range(rounds + 1)]
        counts = [max(len(field) // _SHRINK**number, 1) for number in range(rounds + 1)]
        self._total = sum(counts) + 2
        for size, count in zip(sizes, counts, strict=True):
            field = self._rank([self._try(candidate, seen[:size]) for candidate in field[:count]])
        return field

    def _try(self, candidate: Candidate, requests: Sequence[TraceRequest]) -> Candidate:
        return Candidate(candidate.options, self._figure(self._replayed(candidate, requests)), len(requests))

    def _replayed(self, candidate: Candidate, requests: Sequence[TraceRequest]) -> list[ReplayedRequest]:
        self._tried += 1
        if self._on_trial is not None:
            self._on_trial(self._tried, self._total)
        return self._trial(candidate.options, requests)

    def _rank(self, field: list[Candidate]) -> list[Candidate]:
        return sorted(field, key=lambda candidate: self._sign * candidate.value)

    def _compare(self, ranking: list[Candidate], held_out: Sequence[TraceRequest]) -> Tuned:
        best, default = ranking[0], Candidate({})
        after = self._replayed(best, held_out)
        before = self._replayed(default, held_out) if best.options else after
        change = self._change(before, after)
        return Tuned(
            Candidate(best.options, self._figure(after), len(held_out)),
            Candidate({}, self._figure(before), len(held_out)),
            change,
            (change.high if self._sign > 0 else -change.low) < 0,
            tuple(ranking),
        )

    def _change(self, before: Sequence[ReplayedRequest], after: Sequence[ReplayedRequest]) -> Estimate:
        drawn: list[float] = []
        for _ in range(self._resamples):
            chosen = self._rng.choices(range(len(before)), k=len(before))
            drawn.append(self._relative([before[n] for n in chosen], [after[n] for n in chosen]))
        value = self._relative(before, after)
        return Estimate(value, percentile(drawn or [value], 0.025), percentile(drawn or [value], 0.975))

    def _relative(self, before: Sequence[ReplayedRequest], after: Sequence[ReplayedRequest]) -> float:
        base = self._figure(before)
        return (self._figure(after) - base) / base if base else 0.0


def _from_zero(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    start_s = trace[0].at_s
    return [msgspec.structs.replace(request, at_s=request.at_s - start_s) for request in trace]
