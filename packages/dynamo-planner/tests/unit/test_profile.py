from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import interpolate

from dynamo_core.errors import ConfigurationError
from dynamo_planner._measured import ProfileTiming
from dynamo_planner._profile import DecodeProfile, PrefillProfile, load_decode_profile, load_prefill_profile

PREFILL: dict[str, Any] = {
    "prefill_isl": [100, 500, 1000, 2000, 4000, 8000],
    "prefill_ttft": [20.0, 30.0, 45.0, 80.0, 160.0, 400.0],
    "prefill_thpt_per_gpu": [5000, 16000, 22000, 25000, 25000, 20000],
}
_USAGE, _CONTEXT = (axis.ravel() for axis in np.meshgrid([0.05, 0.2, 0.4, 0.6, 0.8, 0.95], [500, 1000, 2000, 4000]))
DECODE: dict[str, Any] = {
    "x_kv_usage": _USAGE.tolist(),
    "y_context_length": _CONTEXT.tolist(),
    "z_itl": (5 + 40 * _USAGE + _CONTEXT / 1000).tolist(),
    "z_thpt_per_gpu": (100 + 3000 * _USAGE).tolist(),
    "max_kv_tokens": 100_000,
}


def write_npz(folder: Path) -> Path:
    for kind, data in (("prefill", PREFILL), ("decode", {**DECODE, "max_kv_tokens": [100_000]})):
        target = folder / f"selected_{kind}_interpolation"
        target.mkdir()
        np.savez(target / "raw_data.npz", **{name: np.asarray(value) for name, value in data.items()})
    return folder


def write_json(folder: Path) -> Path:
    (folder / "prefill_raw_data.json").write_text(json.dumps(PREFILL))
    (folder / "decode_raw_data.json").write_text(json.dumps(DECODE))
    return folder


@pytest.mark.parametrize("write", [write_npz, write_json])
def test_files_of_the_original_load_unchanged(tmp_path: Path, write: Any) -> None:
    folder = write(tmp_path)
    prefill, decode = load_prefill_profile(folder), load_decode_profile(folder)
    assert prefill.ttft_s(1000) == pytest.approx(0.045)
    assert prefill.tokens_s_per_gpu(2000) == pytest.approx(25000)
    assert decode.max_kv_tokens == 100_000


def test_prefill_is_cubic_between_points_and_clamped_outside() -> None:
    profile = PrefillProfile(*PREFILL.values())
    cubic = interpolate.interp1d(PREFILL["prefill_isl"], PREFILL["prefill_ttft"], kind="cubic")
    for isl in (101, 777, 1500, 3333, 7999):
        assert profile.ttft_s(isl) == pytest.approx(float(cubic(isl)) / 1000)
    assert (profile.ttft_s(1), profile.ttft_s(10**6)) == pytest.approx((0.02, 0.4))


def test_decode_is_the_nearest_point_of_a_hundred_by_hundred_grid() -> None:
    profile = decode_profile()
    grid = interpolate.griddata(
        (DECODE["x_kv_usage"], DECODE["y_context_length"]),
        DECODE["z_itl"],
        tuple(np.meshgrid(np.linspace(0, 1, 100), np.linspace(0, 4000, 100))),
        method="cubic",
    )
    column, row = round(20 * 2000 / 100_000 * 99), round(2000 / 4000 * 99)
    assert profile.itl_s(20, 2000) == pytest.approx(grid[row, column] / 1000)
    assert np.isfinite(profile.itl_s(0, 0))
    assert profile.itl_s(10**6, 10**6) == pytest.approx((5 + 40 * 0.95 + 4) / 1000)


def test_best_throughput_is_the_fullest_column_within_the_target() -> None:
    profile = decode_profile()
    best = profile.best_tokens_s_per_gpu(0.027, 2000)
    assert best == pytest.approx(100 + 3000 * 0.5, rel=0.03)
    assert profile.best_tokens_s_per_gpu(0.0001, 2000) == profile.tokens_s_per_gpu(0, 2000)


def test_latency_that_is_not_monotonic_is_scanned_from_the_fullest_down() -> None:
    itl = [10.0 if usage in (0.05, 0.95) else 90.0 for usage in DECODE["x_kv_usage"]]
    profile = decode_profile(itl)
    assert profile.best_tokens_s_per_gpu(0.02, 4000) == pytest.approx(100 + 3000 * 0.95, rel=0.05)


def decode_profile(itl_ms: list[float] | None = None) -> DecodeProfile:
    return DecodeProfile(
        DECODE["x_kv_usage"],
        DECODE["y_context_length"],
        DECODE["z_itl"] if itl_ms is None else itl_ms,
        tokens_s_per_gpu=DECODE["z_thpt_per_gpu"],
        max_kv_tokens=100_000,
    )


def test_few_points_and_points_on_a_line_still_interpolate() -> None:
    assert PrefillProfile([100, 300], [10, 30], [1, 2]).ttft_s(200) == pytest.approx(0.02)
    line = DecodeProfile(
        [0.1, 0.5, 0.9, 1.0], [1000] * 4, [5, 6, 7, 8], tokens_s_per_gpu=[1, 2, 3, 4], max_kv_tokens=10
    )
    assert line.itl_s(0.005, 1000) == pytest.approx(0.006)


def test_timing_reads_off_the_profiles_and_grows_beyond_them(tmp_path: Path) -> None:
    timing = ProfileTiming.load(write_json(tmp_path), max_num_seqs=64)
    assert timing.prefill_s(1000) == pytest.approx(0.045)
    assert timing.prefill_s(16_000) == pytest.approx(0.8)
    assert timing.prefill_s(0) == 0.0
    assert timing.decode_s(20, 2000) == decode_profile().itl_s(20, 2000)
    assert (timing.max_num_seqs, timing.max_kv_tokens) == (64, 100_000)


def test_bad_profiles_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no prefill profile"):
        load_prefill_profile(tmp_path)
    (tmp_path / "prefill_raw_data.json").write_text('{"prefill_isl": [1]}')
    with pytest.raises(ConfigurationError, match="lacks prefill_ttft, prefill_thpt_per_gpu"):
        load_prefill_profile(tmp_path)
    (tmp_path / "decode_raw_data.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_decode_profile(tmp_path)
    with pytest.raises(ConfigurationError, match="1 lengths, 2 times"):
        PrefillProfile([1], [1, 2], [1])
    with pytest.raises(ConfigurationError, match="max_kv_tokens 0"):
        DecodeProfile([1], [1], [1], tokens_s_per_gpu=[1], max_kv_tokens=0)


def test_a_pickle_in_a_profile_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "selected_prefill_interpolation"
    folder.mkdir()
    np.savez(folder / "raw_data.npz", prefill_isl=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_prefill_profile(tmp_path)
