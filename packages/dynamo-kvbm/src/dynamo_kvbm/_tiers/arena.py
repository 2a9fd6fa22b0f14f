"""Memory for many blocks in one piece, on huge pages where the machine has them.

Copies of large blocks spend much of their time on page-table walks; with pages of 2 MiB there are 512 times fewer.
Reserved huge pages (hugetlbfs) are best, transparent ones come next, and small ones always work.
"""

from __future__ import annotations

import enum
import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynamo_core.errors import ConfigurationError

HUGE_PAGE_BYTES = 2 * 1024**2
_MAP_HUGETLB = 0x40000  # <linux/mman.h>; the module mmap does not name it
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage")


class Pages(enum.Enum):
    """Which pages an arena lies on."""

    HUGETLB = "hugetlb"
    TRANSPARENT = "transparent"
    SMALL = "small"


def allocate_arena(size: int) -> tuple[NDArray[np.uint8], Pages]:
    """Return private memory that begins at a page, and which pages it lies on.

    Raises:
        ConfigurationError: if the machine has not that much memory.
    """
    if size < HUGE_PAGE_BYTES:
        return np.frombuffer(_map(size, size), dtype=np.uint8)[:size], Pages.SMALL
    whole = round_up(size, HUGE_PAGE_BYTES)
    try:
        reserved = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)
    except OSError:  # none are reserved, or too few; the mapping reserves them, so a success is final
        memory, pages = _transparent(whole, size)
        return memory[:size], pages
    return np.frombuffer(reserved, dtype=np.uint8)[:size], Pages.HUGETLB


def advise_huge(memory: mmap.mmap, policy: str = "enabled") -> Pages:
    """Ask for transparent huge pages; return what the kernel's setting gives.

    Args:
        memory: The mapping.
        policy: The setting that rules it: ``enabled`` for private memory, ``shmem_enabled`` for shared memory.
    """
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        setting = (_TRANSPARENT / policy).read_text(encoding="ascii")
    except (OSError, ValueError):
        return Pages.SMALL
    off = "[never]" in setting or "[deny]" in setting
    return Pages.SMALL if off else Pages.TRANSPARENT


def round_up(size: int, unit: int) -> int:
    """Return the next multiple of ``unit``."""
    return -(-size // unit) * unit


def _transparent(whole: int, size: int) -> tuple[NDArray[np.uint8], Pages]:
    memory = _map(whole + HUGE_PAGE_BYTES, size)
    pages = advise_huge(memory)
    flat = np.frombuffer(memory, dtype=np.uint8)
    skip = -flat.ctypes.data % HUGE_PAGE_BYTES  # a huge page begins at a multiple of its size
    return flat[skip:], pages


def _map(length: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigurationError(
            f"host tier needs {size} bytes of memory, more than the machine gives; lower host_blocks or host_bytes"
        ) from error
