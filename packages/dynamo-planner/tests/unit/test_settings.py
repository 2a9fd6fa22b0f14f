import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import resolve_settings
from dynamo_planner import PlannerSettings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--min-replicas", "5", "--max-replicas", "2"], "exceeds --max-replicas 2"),
        (["--stale-after-s", "1"], "is below --interval-s"),
        (["--utilization", "0"], "--utilization"),
        (["--requests-per-replica-s", "nan"], "--requests-per-replica-s"),
        (["--min-replica", "1"], "did you mean --min-replicas"),
    ],
)
def test_bad_options_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve_settings("dynamo planner", [PlannerSettings], argv, environ={})
