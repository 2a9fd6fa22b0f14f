"""Puts the helpers of this folder (the dense oracle, the parts of an engine) within reach of its tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from dense_oracle import DenseModel
from parts import TINYLM


@pytest.fixture(scope="session")
def oracle() -> DenseModel:
    return DenseModel(TINYLM)
