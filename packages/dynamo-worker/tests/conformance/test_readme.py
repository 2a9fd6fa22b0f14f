"""The README's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from dynamo_core.engine import Engine
from dynamo_core.testing import EngineConformance

README = Path(__file__).parents[2] / "README.md"
RUN, ENGINE = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def repeat_engine() -> Any:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(ENGINE, str(README), "exec"), names)
    return names["RepeatEngine"]


class TestReadmeEngine(EngineConformance):
    factory = repeat_engine()

    def make_engine(self) -> Engine:
        return self.factory.from_args([])


def test_the_engine_is_short() -> None:
    assert len([line for line in ENGINE.splitlines() if line.strip()]) < 100


def test_the_example_prints_its_tokens(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(RUN, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    tokens = [line for line in done.stdout.splitlines() if re.fullmatch(r"\d+", line)]
    assert len(tokens) == 8


async def test_the_host_serves_the_readme_engine(process: Any, kit: Any) -> None:
    await process.worker(repeat_engine()())
    reply = await process.ask(kit.request(prompt=[5, 6], max_tokens=5))
    assert (reply.error, reply.tokens) == (None, [5, 6, 5, 6, 5])
