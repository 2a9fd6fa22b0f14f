"""``dynamo-router explain``: one decision as a table."""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import msgspec
from pydantic import Field

from dynamo_core.errors import ConfigurationError, NotFoundError, UnavailableError
from dynamo_core.routing import CandidateScore, RequestOutcome, RoutingDecision
from dynamo_core.settings import DynamoSettings, resolve_settings
from dynamo_router._receipts import regret_tokens

PROG = "dynamo-router explain ID"
_TIMEOUT_S = 10.0


class ExplainSettings(DynamoSettings):
    """Where the decision was taken."""

    component: ClassVar[str] = "router_explain"

    url: Annotated[str, Field(pattern="^https?://", description="Selection service that took the decision")] = (
        "http://127.0.0.1:8092"
    )


class _Kept(msgspec.Struct):
    decision: RoutingDecision
    outcome: RequestOutcome | None = None


def explain(argv: Sequence[str], write: Callable[[str], None]) -> int:
    """Run the command.

    Raises:
        ConfigurationError: without an id or with a bad flag.
        NotFoundError: if the service does not keep the decision.
        UnavailableError: if the service cannot be reached.
    """
    named = bool(argv) and not argv[0].startswith("-")
    if not named and "--help" not in argv:
        raise ConfigurationError(f"{PROG}: give the decision's id first; it is in the x-dynamo-decision-id header")
    settings = resolve_settings(PROG, (ExplainSettings,), argv[1:] if named else argv).get(ExplainSettings)
    kept = _fetch(settings.url, argv[0])
    write(render(kept.decision, kept.outcome))
    return 0


def render(decision: RoutingDecision, outcome: RequestOutcome | None) -> str:
    """Return a decision in words and its candidates as a table, the choice first."""
    lines = [
        f"request {decision.request_id or '-'} went to worker {decision.worker} by policy {decision.policy}"
        + (f" ({decision.reason})" if decision.reason else ""),
        f"expected {decision.cached_tokens} cached tokens (index {decision.index_mode}); "
        f"margin {_number(decision.margin)}; waited {decision.queued_s:.3f} s",
    ]
    if outcome is not None:
        lines.append(
            f"ended {outcome.finish_reason.value} after {outcome.duration_s:.3f} s; first token "
            f"{_number(outcome.ttft_s)} s; the engine reported {_number(outcome.cached_tokens)} cached tokens"
        )
    if regret := regret_tokens(decision, outcome):
        lines.append(f"the worker with most of the prompt would have saved {regret} prefill tokens")
    if not decision.candidates:
        return "\n".join([*lines, "its candidates were not recorded; set receipts=on to record every decision's"])
    return "\n".join([*lines, "", *_table(decision)])


def _table(decision: RoutingDecision) -> list[str]:
    terms = list(dict.fromkeys(term for score in decision.candidates for term in score.weighted))
    head = ["worker", "cost", *terms, "cached", "queued", "active", "note"]
    scored = sorted(decision.candidates, key=lambda score: (score.worker != decision.worker, _order(score)))
    rows = [_row(score, terms, decision) for score in scored]
    widths = [max(len(line[column]) for line in [head, *rows]) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *rows]]


def _row(score: CandidateScore, terms: list[str], decision: RoutingDecision) -> list[str]:
    note = "chosen" if score.worker == decision.worker else score.rejected_by
    raw = [_number(score.raw.get(name)) for name in ("cached_tokens", "prefill_tokens", "active_requests")]
    return [
        str(score.worker),
        _number(score.cost),
        *(_number(score.weighted.get(term)) for term in terms),
        *raw,
        note,
    ]


def _order(score: CandidateScore) -> float:
    return float("inf") if score.cost is None else score.cost


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value + 0.0:.4g}"  # adding turns -0 into 0


def _fetch(url: str, identity: str) -> _Kept:
    address = f"{url.rstrip('/')}/v1/decisions/{urllib.parse.quote(identity, safe='')}"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            return msgspec.json.decode(answer.read(), type=_Kept)
    except urllib.error.HTTPError as error:
        raise NotFoundError(f"{url} does not keep decision {identity!r} (status {error.code})") from error
    except (urllib.error.URLError, msgspec.MsgspecError) as error:
        raise UnavailableError(f"no selection service answers at {url}: {error}; give its --url") from error
