"""Options that were renamed: their former names work, and warn."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings, resolve_settings


class MovedSettings(DynamoSettings):
    """Options that had other names."""

    component = "moved"
    renamed: ClassVar[Mapping[str, str]] = {"limit": "max_requests", "quick": "fast", "tags": "taints"}
    max_requests: int = Field(8, ge=1, description="requests at once")
    fast: bool = Field(False, description="hurry")
    taints: list[str] = Field(default_factory=list[str], description="labels")


def moved(*argv: str, environ: Mapping[str, str] | None = None) -> MovedSettings:
    return resolve_settings("dynamo moved", (MovedSettings,), argv, environ=environ or {}).get(MovedSettings)


def test_former_names_work_and_warn(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("limit: 3\n")
    with pytest.warns(FutureWarning, match="option limit of .* is deprecated; it is called option max_requests"):
        assert moved("--config", str(file)).max_requests == 3
    with pytest.warns(FutureWarning, match="DYN_MOVED_LIMIT is deprecated; it is called DYN_MOVED_MAX_REQUESTS now"):
        assert moved(environ={"DYN_MOVED_LIMIT": "4"}).max_requests == 4
    with pytest.warns(FutureWarning, match="--tags is deprecated; it is called --taints now"):
        assert moved("--tags", "a,b", "--tags", "c").taints == ["a", "b", "c"]
    with pytest.warns(FutureWarning, match="--quick is deprecated"):
        assert moved("--quick").fast


def test_a_former_name_obeys_the_order_of_sources_and_the_limits() -> None:
    with pytest.warns(FutureWarning):
        assert moved("--max-requests", "2", environ={"DYN_MOVED_LIMIT": "4"}).max_requests == 2
    with pytest.warns(FutureWarning), pytest.raises(ConfigurationError, match="--max-requests has the value '0'"):
        moved("--limit", "0")


def test_one_source_cannot_give_both_names() -> None:
    with pytest.raises(ConfigurationError, match="--limit is the former name of --max-requests; give only"):
        moved("--limit", "2", "--max-requests", "3")


def test_former_names_are_not_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        moved("--help")
    shown = capsys.readouterr().out
    assert "--max-requests" in shown
    assert "--limit" not in shown


def test_a_former_name_that_is_taken_or_leads_nowhere_is_refused() -> None:
    class Taken(DynamoSettings):
        renamed: ClassVar[Mapping[str, str]] = {"port": "host"}
        port: int = Field(1, description="port")
        host: str = Field("", description="host")

    class Nowhere(DynamoSettings):
        renamed: ClassVar[Mapping[str, str]] = {"old": "gone"}

    for kind in (Taken, Nowhere):
        with pytest.raises(ConfigurationError, match="cannot be a former name"):
            resolve_settings("dynamo moved", (kind,), (), environ={})


def test_a_former_name_is_taken_as_a_keyword_too() -> None:
    with pytest.warns(FutureWarning, match="limit is deprecated; it is called max_requests now"):
        assert MovedSettings.model_validate({"limit": 3}).max_requests == 3
    with pytest.raises(ConfigurationError, match="limit is the former name of max_requests"):
        MovedSettings.model_validate({"limit": 3, "max_requests": 4})
