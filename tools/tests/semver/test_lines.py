import pytest

from dynamo_tools.semver.change import Level
from dynamo_tools.semver.lines import compare

PROTOCOL = "core.Shape class(Protocol)\ncore.Shape.area async def(self, unit: str = 'm') -> float\n"
RECORD = "core.Point class(Struct, array_like=True)\ncore.Point order: x\ncore.Point.x: int\n"
PLAIN = "core.move def(point: Point, by: int) -> Point | None\n"
MARKED = (
    "core.New @experimental class()\ncore.New.go def(self) -> int\ncore.Soon @beta('1.0') class()\ncore.Soon.x: int\n"
)
SETTING = (
    "settings router.wait_s --wait-s DYN_ROUTER_WAIT_S: float = 1.0 (gt=0)\nsettings-text router.wait_s How long.\n"
)
OTHERS = "entry-point dynamo_core.routers: kv = a:b\nextra otlp: a>=1\nmetric seen_total counter(model)\n"
OLD = PROTOCOL + RECORD + PLAIN + MARKED + SETTING + OTHERS + "core.Kind.ROUND = 'round'\nrequires python: >=3.11\n"


def level(old: str, new: str) -> Level:
    assert old in OLD
    return max(change.level for change in compare(OLD, OLD.replace(old, new)))


def test_nothing_changed():
    assert compare(OLD, OLD) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PLAIN, ""),
        ("async def(self, unit", "def(self, unit"),
        ("-> float\n", "-> float\ncore.Shape.name def(self) -> str\n"),
        ("unit: str = 'm'", "unit: str | None = 'm'"),
        ("unit: str = 'm'", "unit: str"),
        ("unit: str = 'm'", "unit: str = 'm', deep: bool = False"),
        ("-> float", "-> int"),
        ("point: Point", "point: Shape"),
        ("by: int)", "by: int, fast: bool)"),
        ("by: int)", "*, by: int)"),
        ("point: Point, by: int", "by: int, point: Point"),
        ("Point | None", "Point | None | str"),
        ("order: x\n", "order: y, x\n"),
        ("core.Point.x: int\n", "core.Point.x: int\ncore.Point.y: int\n"),
        ("core.Point.x: int", "core.Point.x: str"),
        ("'round'", "'ring'"),
        ("Struct, array_like=True", "Struct"),
        ("class(Protocol)", "class()"),
        (SETTING, ""),
        (": float = 1.0", ": int = 1"),
        ("= 1.0 (gt=0)", "required (gt=0)"),
        ("(gt=0)", "(gt=1)"),
        (SETTING, SETTING + "settings router.new --new DYN_ROUTER_NEW: str required\n"),
        ("entry-point dynamo_core.routers: kv = a:b\n", ""),
        ("counter(model)", "counter(model, reason)"),
        ("metric seen_total counter(model)\n", ""),
        ("extra otlp: a>=1\n", ""),
    ],
)
def test_breaks_are_major(old, new):
    assert level(old, new) is Level.MAJOR


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PLAIN, PLAIN + "core.turn def() -> None\n"),
        ("by: int)", "by: int, fast: bool = False)"),
        ("by: int)", "by: int | float)"),
        ("by: int)", "by: int = 1)"),
        ("Point | None", "Point"),
        ("core.move def", "core.move @deprecated('2.0') def"),
        ("order: x\n", "order: x, y\ncore.Point.y: int = 0\n"),
        ("core.Kind.ROUND = 'round'\n", "core.Kind.ROUND = 'round'\ncore.Kind.FLAT = 'flat'\n"),
        ("= 1.0 (gt=0)", "= 2.0 (gt=0)"),
        ("= 1.0 (gt=0)", "= 1.0"),
        (SETTING, SETTING + "settings router.new --new DYN_ROUTER_NEW: str = ''\n"),
        ("extra otlp: a>=1", "extra otlp: a>=2"),
        ("python: >=3.11", "python: >=3.12"),
        ("core.Soon.x: int\n", ""),
        (
            "class(Protocol)\n",
            "class(Protocol)\ncore.SupportsName class(Protocol)\ncore.SupportsName.name def() -> str\n",
        ),
    ],
)
def test_what_old_users_do_not_notice_is_minor(old, new):
    assert level(old, new) is Level.MINOR


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("How long.", "How long to wait."),
        ("kv = a:b", "kv = a:c"),
        ("core.New.go def(self) -> int\n", ""),
    ],
)
def test_what_nobody_was_promised_is_a_patch(old, new):
    assert level(old, new) is Level.PATCH


def test_a_removed_class_is_one_change():
    assert [change.subject for change in compare(OLD, OLD.replace(PROTOCOL, ""))] == ["core.Shape"]


def test_a_fingerprint_covers_one_change_only():
    first, second = (compare(OLD, OLD.replace("by: int", new))[0] for new in ("by: str", "by: bytes"))
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint in str(first)


def test_a_required_option_of_a_part_that_was_not_there_is_no_break():
    new = OLD + "settings engine.model --model DYN_ENGINE_MODEL: str required\n"
    assert [str(change.level) for change in compare(OLD, new)] == ["minor"]


def test_a_function_that_is_deprecated_is_no_break():
    marked = PLAIN.replace("def(", "@deprecated(since='1.1', removed_in='2.0', use='x') def(")
    assert level(PLAIN, marked) is Level.MINOR
