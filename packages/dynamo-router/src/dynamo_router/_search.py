"""Search over closed prefixes: where "holds the block at position i" only turns from true to false along a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def closed_depths(holders: Mapping[int, int], hashes: Sequence[int], among: int = -1) -> list[tuple[int, int]]:
    """Return ``(leading blocks held, slots)`` for each distinct depth above zero, each slot once.

    Costs O(log blocks) look-ups for each distinct depth.

    Args:
        holders: Block -> bit set of the slots that hold it; what each slot holds must be closed under "parent of".
        hashes: The prompt's blocks. Only those looked at are touched: pass the packed view rather than a list.
        among: Slots to consider.
    """
    found: list[tuple[int, int]] = []
    high = len(hashes)
    get = holders.get
    alive = get(hashes[0], 0) & among if high else 0
    if not alive:
        return found
    last = alive if high == 1 else get(hashes[high - 1], 0) & alive
    if last:
        found.append((high, last))
    # Each entry spans blocks low..high with different holders at its ends; a span of one is a cut point.
    spans = [(0, alive, high - 1, last)] if last != alive else []
    while spans:
        low, at_low, high, at_high = spans.pop()
        while high - low > 1:
            middle = (low + high) >> 1
            held = get(hashes[middle], 0) & at_low
            if held == at_low:
                low = middle
            elif held == at_high:
                high = middle
            else:
                spans.append((middle, held, high, at_high))
                high, at_high = middle, held
        found.append((high, at_low & ~at_high))
    return found
