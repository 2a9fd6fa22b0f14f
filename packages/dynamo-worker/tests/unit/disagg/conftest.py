"""Puts the rig of this folder within reach of its tests."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rig import Pair


@pytest.fixture
def pair(process: Any, kit: Any) -> Pair:
    return Pair(process, kit)
