"""Leaves out the tests that need a GPU unless ``-m gpu`` asks for them."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked ``gpu`` if no marker expression was given."""
    if config.option.markexpr:
        return
    asked = [item for item in items if item.get_closest_marker("gpu") is None]
    if len(asked) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in asked])
        items[:] = asked
