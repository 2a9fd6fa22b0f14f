"""Puts the stand-in for TensorRT-LLM within reach of the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
