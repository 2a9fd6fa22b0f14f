"""Memory that reads go into, used again once nobody holds a piece of it.

Fresh memory costs a page fault for each of its pages, which for large blocks is as long as half of the read itself.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from dynamo_kvbm._tiers.arena import advise_huge
from dynamo_kvbm._tiers.slot_file import aligned_bytes

MIN_BYTES = 1024**2
MAX_BYTES = 64 * 1024**2
KEPT_PIECES = 2


class ReadMemory:
    """Page-aligned pieces. Any thread may take one; whoever drops the last view of a piece gives it back."""

    def __init__(self) -> None:
        # A deque, since its steps are atomic: a piece comes back on any thread at any moment, inside ``take`` too.
        self._kept: deque[mmap.mmap] = deque(maxlen=KEPT_PIECES)

    @property
    def kept_bytes(self) -> int:
        """Memory that waits to be used again; at most ``KEPT_PIECES`` times ``MAX_BYTES``."""
        return sum(map(len, list(self._kept)))

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return memory that begins at a page. Its content is anything.

        Small and very large pieces are made anew: the one is cheap, and the other would be dear to keep.
        """
        if not MIN_BYTES <= size <= MAX_BYTES:
            return aligned_bytes(size)
        piece = self._find(size)
        if piece is None:
            piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            advise_huge(piece)
        whole = np.frombuffer(piece, dtype=np.uint8)
        # Every view that is made of the array keeps the array, so its end is the end of all of them.
        weakref.finalize(whole, self._kept.append, piece).atexit = False
        return whole[:size]

    def _find(self, size: int) -> mmap.mmap | None:
        for _ in range(KEPT_PIECES):
            try:
                piece = self._kept.popleft()
            except IndexError:
                return None
            if len(piece) >= size:
                return piece
            # Too small, and so it goes: what is asked for now is what will be asked for next.
        return None
