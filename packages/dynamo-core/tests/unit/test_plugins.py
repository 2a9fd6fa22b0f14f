"""Plug-ins: found by name, loaded lazily, missed with the words that help."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_core.memory import create_discovery, create_event_bus, create_request_plane
from dynamo_core.noop import create_router

GROUP = "dynamo_core.engines"


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    found: list[EntryPoint] = []
    monkeypatch.setattr(plugins, "_entry_points", lambda group: tuple(e for e in found if e.group == group))
    yield found


@pytest.mark.parametrize(
    ("kind", "name", "target"),
    [
        ("discoveries", "mem", create_discovery),
        ("request_planes", "mem", create_request_plane),
        ("event_buses", "mem", create_event_bus),
        ("routers", "round-robin", create_router),
    ],
)
def test_own_entries_are_installed(kind: str, name: str, target: object) -> None:
    assert plugins.load(kind, name) is target


def test_unknown_kind_names_the_kinds() -> None:
    with pytest.raises(ConfigurationError, match=r"'engine' is not one of .*engines.*routers"):
        plugins.available("engine")


def test_miss_names_what_is_installed_and_what_to_install(entries: list[EntryPoint]) -> None:
    entries += [EntryPoint("b", "x:y", GROUP), EntryPoint("a", "x:y", GROUP)]
    with pytest.raises(ConfigurationError) as caught:
        plugins.load("engines", "reference")
    assert "'reference'" in caught.value.message
    assert "(installed: a, b)" in caught.value.message
    assert "pip install 'dynamo-worker'" in caught.value.message


def test_miss_of_a_foreign_name(entries: list[EntryPoint]) -> None:
    with pytest.raises(ConfigurationError, match=r"'zzz' \(installed: none\); install the distribution"):
        plugins.load("engines", "zzz")


def test_two_claims_of_one_name_are_refused(entries: list[EntryPoint]) -> None:
    entries += [EntryPoint("a", "one:x", GROUP), EntryPoint("a", "two:x", GROUP)]
    with pytest.raises(ConfigurationError, match=r"'a' is claimed by one:x and two:x; uninstall one"):
        plugins.available("engines")


def test_one_claim_seen_twice_is_fine(entries: list[EntryPoint]) -> None:
    entries += [EntryPoint("a", "one:x", GROUP), EntryPoint("a", "one:x", GROUP)]
    assert list(plugins.available("engines")) == ["a"]


@pytest.mark.parametrize("value", ["no_such_module:x", "json:no_such_name"])
def test_import_failure_says_why(entries: list[EntryPoint], value: str) -> None:
    entries.append(EntryPoint("a", value, GROUP))
    with pytest.raises(ConfigurationError, match=r"cannot be imported.*no_such"):
        plugins.load("engines", "a")


def test_listing_imports_nothing(entries: list[EntryPoint]) -> None:
    entries.append(EntryPoint("a", "no_such_module:x", GROUP))
    assert plugins.available("engines")["a"].value == "no_such_module:x"


def test_only_the_asked_one_is_imported(entries: list[EntryPoint]) -> None:
    entries += [EntryPoint("bad", "no_such_module:x", GROUP), EntryPoint("good", "json:loads", GROUP)]
    assert plugins.load("engines", "good")("1") == 1


def test_homes_are_of_known_kinds() -> None:
    assert {kind for kind, _ in plugins._HOME} <= plugins.KINDS.keys()
