"""Leaves out tests that need a GPU or take minutes unless ``-m gpu`` or ``-m slow`` asks for them."""

from __future__ import annotations

import pytest

ASKED_FOR_BY_NAME = {"gpu", "slow"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect them if no marker expression was given."""
    if config.option.markexpr:
        return
    left_out = [item for item in items if ASKED_FOR_BY_NAME & {mark.name for mark in item.iter_markers()}]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
