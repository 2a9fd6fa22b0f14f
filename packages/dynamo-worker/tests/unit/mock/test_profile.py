"""Step times from a measured profile."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.requests import StopConditions
from dynamo_worker import MockEngine
from dynamo_worker._mock._profile import TimingProfile
from dynamo_worker._mock._timing import StepTiming

TABLES: dict[str, Any] = {
    "prefill_isl": [100, 200, 400],
    "prefill_ttft_ms": [10.0, 30.0, 50.0],
    "decode_active_kv_tokens": [0, 1000],
    "decode_context_length": [10, 110],
    "decode_itl": [[4.0, 6.0], [8.0, 20.0]],
}


def write(path: Path, tables: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: np.array(values) for name, values in tables.items()})
    else:
        path.write_text(json.dumps(tables), encoding="utf-8")
    return path


@pytest.fixture(params=["profile.json", "profile.npz"])
def profile(request: pytest.FixtureRequest, tmp_path: Path) -> TimingProfile:
    return TimingProfile.load(write(tmp_path / request.param, TABLES))


@pytest.mark.parametrize(("tokens", "ms"), [(1, 10.0), (100, 10.0), (150, 20.0), (200, 30.0), (300, 40.0), (999, 50.0)])
def test_prefill_is_linear_between_points_and_constant_beyond(profile: TimingProfile, tokens: int, ms: float) -> None:
    assert profile.prefill(tokens) == pytest.approx(ms)


@pytest.mark.parametrize(
    ("active", "context", "ms"),
    [(0, 10, 4.0), (0, 60, 5.0), (500, 10, 6.0), (500, 60, 9.5), (1000, 110, 20.0), (9999, 9999, 20.0), (0, 1, 4.0)],
)
def test_decode_is_linear_along_both_axes(profile: TimingProfile, active: int, context: int, ms: float) -> None:
    assert profile.decode(active, context) == pytest.approx(ms)


def test_the_ratios_divide_a_profile_too(profile: TimingProfile) -> None:
    timing = StepTiming(speedup_ratio=10, decode_speedup_ratio=2, profile=profile)
    seconds = timing.step_s(prefill_tokens=150, decoding=1, occupancy=0.9, active_tokens=500, context_tokens=60)
    assert seconds == pytest.approx((20.0 / 10 + 9.5 / 20) / 1000)


async def test_the_engine_takes_the_time_of_its_profile(process: Any, kit: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "profile.json", TABLES | {"prefill_ttft_ms": [700.0] * 3, "decode_itl": [[100.0] * 2] * 2})
    await process.worker(MockEngine.from_args(["--timing-profile", str(path)]))
    reply = await process.open(kit.request(stop=StopConditions(max_tokens=3)))
    await process.clock.advance(0.69)
    assert reply.tokens == []
    await process.clock.advance(0.02)
    assert len(reply.tokens) == 1
    await process.clock.advance(0.2)
    assert len(reply.tokens) == 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"decode_itl": None}, "cannot be read"),
        ({"prefill_isl": [100, 100, 400]}, "prefill_isl that is empty or does not rise"),
        ({"prefill_ttft_ms": [1.0]}, "1 prefill_ttft_ms for 3 prefill_isl"),
        ({"decode_itl": [[4.0, 6.0]]}, "2 rows of 2"),
        ({"decode_itl": [[4.0, 6.0], [8.0, 0.0]]}, "not above 0"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = write(tmp_path / "profile.json", TABLES | change)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        TimingProfile.load(path)
    assert "--timing-profile" in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["nowhere.json", "nowhere.npz"])
def test_a_missing_profile_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        TimingProfile.load(tmp_path / name)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    tables = {name: values for name, values in TABLES.items() if name != "decode_itl"}
    for name in ("profile.json", "profile.npz"):
        with pytest.raises(ConfigurationError, match="has no array 'decode_itl'"):
            TimingProfile.load(write(tmp_path / name, tables))
