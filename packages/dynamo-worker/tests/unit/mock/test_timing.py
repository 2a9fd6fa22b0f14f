import pytest

from dynamo_worker._mock._timing import StepTiming, decode_ms, prefill_ms


def test_the_fits() -> None:
    assert prefill_ms(0) == pytest.approx(16.50142)
    assert prefill_ms(1000) == pytest.approx(32.1058588)
    assert decode_ms(0.0) == pytest.approx(5.74)
    assert decode_ms(1.0) == pytest.approx(34.01)
    assert decode_ms(-1.0) == 1.0


def test_a_mixed_step_takes_both_parts_and_the_ratios_divide() -> None:
    timing = StepTiming(speedup_ratio=10, decode_speedup_ratio=2)
    assert timing.step_s(prefill_tokens=1000, decoding=0, occupancy=0.5) == pytest.approx(0.00321058588)
    assert timing.step_s(prefill_tokens=0, decoding=9, occupancy=0.0) == pytest.approx(0.000287)
    assert timing.step_s(prefill_tokens=1000, decoding=1, occupancy=0.0) == pytest.approx(0.00349758588)
    assert timing.step_s(prefill_tokens=0, decoding=0, occupancy=1.0) == 0
