"""Numbers without a state: a function of their coordinates alone, the same on every machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def uniforms(
    seeds: npt.NDArray[np.uint64], choices: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each triple: a counter-based generator, so there is no state to carry."""
    mixed = _mix(_mix(_mix(seeds) + choices) + positions)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # SplitMix64: adds the golden ratio, then scrambles; every bit of the input reaches every bit of the output.
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
