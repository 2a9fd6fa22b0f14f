import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_process.py"


async def test_one_process_echoes_the_prompt() -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]

    assert await main() == [3, 1, 4, 1, 5]


def test_one_process_stays_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60
