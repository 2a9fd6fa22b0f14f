import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_example_runs_as_shown():
    text = README.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code.group(1)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert f"`{done.stdout.strip()}`" in text
