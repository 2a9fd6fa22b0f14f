"""Matrix products whose rows do not depend on how many there are.

A BLAS sums one row, or one column, in another order than many: so no product has a single row, and none less than 16
columns. Weights lie ``[in, out]``: then OpenBLAS on AVX-512 sums each output over ``in`` in one order whatever the
number of rows. Other kernels may differ in the last bit; ``_invariance`` finds out which ones this machine has. Wide
weights are cut into panels, because a BLAS repacks a large right-hand side on each call, which for a few rows costs
more than the product.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_WIDE_ELEMENTS = 1 << 16
_PANEL_ELEMENTS = 1 << 15
_MIN_PANEL_WIDTH = 128
_MIN_WIDTH = 16


class Linear:
    """``rows @ weight.T``.

    Args:
        weight: ``[out, in]``, as checkpoints have it.
    """

    def __init__(self, weight: Floats) -> None:
        self._width = len(weight)
        if self._width < _MIN_WIDTH:
            weight = np.concatenate((weight, np.zeros((_MIN_WIDTH - len(weight), weight.shape[1]), dtype=np.float32)))
        width, height = weight.shape
        panels = _panel_count(width, height)
        self._panels = np.ascontiguousarray(weight.reshape(panels, width // panels, height).swapaxes(1, 2))

    def __call__(self, rows: Floats) -> Floats:
        """Multiply ``[rows, in]``; returns ``[rows, out]``."""
        count = len(rows)
        if count == 1:
            rows = np.concatenate((rows, rows))
        if len(self._panels) == 1:
            return (rows @ self._panels[0])[:count, : self._width]
        panels, _, width = self._panels.shape
        out = np.empty((len(rows), panels * width), dtype=np.float32)
        np.matmul(rows, self._panels, out=out.reshape(-1, panels, width).swapaxes(0, 1))
        return out[:count]


def _panel_count(width: int, height: int) -> int:
    """Return how many equal panels of a bounded number of elements a wide matrix makes; 1 if they get too thin."""
    if width * height <= _WIDE_ELEMENTS:
        return 1
    for panels in range(1, width // _MIN_PANEL_WIDTH + 1):
        if width % panels == 0 and width // panels * height <= _PANEL_ELEMENTS:
            return panels
    return 1
