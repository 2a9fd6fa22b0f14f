"""The bundled model as a GGUF file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import gguf_model


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_model.write_gguf(tmp_path_factory.mktemp("gguf") / "tinylm.gguf")
