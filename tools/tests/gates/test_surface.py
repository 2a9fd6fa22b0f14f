import pytest

from dynamo_tools.gates import surface
from dynamo_tools.surface import dump

CORE = "packages/dynamo-core/src/dynamo_core/shapes.py"
CODE = '''"""Shapes."""

import enum
from typing import Protocol

import msgspec


class Shape(Protocol):
    async def area(self, unit: str = "m") -> float: ...


class Kind(enum.Enum):
    ROUND = "round"


class Point(msgspec.Struct, array_like=True):
    x: int
    y: int = 0


def move(point: Point, *, by: int) -> Point:
    return point
'''


def write(tree):
    for package in tree.workspace().packages:
        tree.write(f"packages/{package.name}/api/public.txt", dump(package))


@pytest.fixture
def shapes(tree):
    tree.write(CORE, CODE)
    write(tree)
    return tree


def test_a_written_surface_passes(shapes):
    assert shapes.failures(surface.check) == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("async def area", "def area", "-dynamo_core.shapes.Shape.area async def"),
        ("-> float: ...", "-> float: ...\n    def name(self) -> str: ...", "+dynamo_core.shapes.Shape.name def"),
        ("unit: str", "unit: int", "+dynamo_core.shapes.Shape.area async def(self, unit: int = 'm') -> float"),
        ('unit: str = "m"', "unit: str", "+dynamo_core.shapes.Shape.area async def(self, unit: str) -> float"),
        ('"round"', '"ring"', "+dynamo_core.shapes.Kind.ROUND = 'ring'"),
        ("x: int\n    y: int = 0", "y: int = 0\n    x: int = 0", "+dynamo_core.shapes.Point order: y, x"),
        ("*, by", "by", "+dynamo_core.shapes.move def(point: Point, by: int) -> Point"),
        ("class Shape(Protocol)", "class Shape", "+dynamo_core.shapes.Shape class()"),
    ],
)
def test_each_kind_of_break_is_a_line(shapes, old, new, line):
    shapes.replace(CORE, old, new)
    assert any(line in found for found in shapes.failures(surface.check))


def test_settings_metrics_and_entry_points_are_public_wherever_they_are(shapes):
    source = "packages/dynamo-router/src/dynamo_router"
    field = 'Field(1.0, gt=0, description="How long.")'
    shapes.write("packages/dynamo-core/src/dynamo_core/settings.py", BASE)
    settings = "from typing import ClassVar\n\nfrom pydantic import Field\n\n\n"
    settings += f'class S(DynamoSettings):\n    component: ClassVar[str] = "router"\n    wait_s: float = {field}\n'
    shapes.write(f"{source}/_settings.py", "from dynamo_core.settings import DynamoSettings\n\n\n" + settings)
    shapes.write(f"{source}/_metrics.py", 'SEEN = "dynamo_router_seen_total"\n')
    shapes.append(
        "packages/dynamo-router/pyproject.toml", '\n[project.entry-points."dynamo_core.routers"]\nkv = "a:b"\n'
    )
    found = "\n".join(shapes.failures(surface.check))
    assert "+settings router.wait_s --wait-s DYN_ROUTER_WAIT_S: float = 1.0 (gt=0);" in found
    assert "+settings-text router.wait_s How long.;" in found
    assert "+metric dynamo_router_seen_total unknown()" in found
    assert "+entry-point dynamo_core.routers: kv = a:b" in found
    assert "packages/dynamo-router/api/schemas.json:1: surface: is out of date" in found


BASE = """
from typing import ClassVar

from pydantic import BaseModel


class DynamoSettings(BaseModel):
    component: ClassVar[str] = ""
"""
LAZY = """
from typing import Any

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    from dynamo_worker._engine import Engine

    return Engine
"""


def test_a_lazy_name_is_spelled_out(tree):
    tree.write("packages/dynamo-worker/src/dynamo_worker/__init__.py", LAZY)
    tree.write("packages/dynamo-worker/src/dynamo_worker/_engine.py", "class Engine:\n    def run(self) -> int: ...\n")
    assert "dynamo_worker.Engine.run def(self) -> int\n" in dump(tree.workspace().find("worker"))


def test_private_modules_are_not_public(shapes):
    shapes.write("packages/dynamo-router/src/dynamo_router/_a.py", "def inner() -> int:\n    return 1\n")
    assert shapes.failures(surface.check) == []


def test_a_long_difference_is_cut(shapes):
    names = [f"name_{number}" for number in range(30)]
    shapes.append(CORE, "".join(f"\n{name} = 1\n" for name in names))
    found = shapes.failures(surface.check)
    assert len(found) == surface.SHOWN_LINES + 1
    assert "and 10 more lines" in found[-1]
