"""Two dumps of a public surface, compared line by line, with a level for each difference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dynamo_tools.semver.change import Change, Level
from dynamo_tools.semver.signatures import compare_functions, is_function

_LABELLED = re.compile(
    r"(?P<kind>settings|settings-text|metric|metric-text|entry-point|extra|requires) (?P<name>[^ ]+(?:: [^ =]+(?= =))?)"
)
_MEMBER = re.compile(r"(?P<name>[\w.]+(?: order(?=:))?)(?P<rest>.*)")
_SETTING = re.compile(r"(?P<where>\S+ \S+: .+?) (?P<default>required|= .+?)(?P<limits> \(\w+=.*\))?$")
_FLAGS = re.compile(r"@(?P<flag>\w+)(?:\([^@]*\))? ")
_STABILITY = ("beta", "experimental", "deprecated")
_RECORDS = ("Struct", "NamedTuple")


@dataclass(frozen=True)
class Surface:
    """A dump, read: what each thing is, by kind and name."""

    lines: dict[tuple[str, str], str]

    @classmethod
    def read(cls, text: str) -> Surface:
        """Read a dump; several lines of one name, such as overloads, are one text."""
        found: dict[tuple[str, str], str] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                kind, name, rest = _split(line)
                found[kind, name] = f"{found[kind, name]}\n{rest}" if (kind, name) in found else rest
        return cls(found)

    def member(self, name: str) -> str:
        """What a dotted name is; empty if it is not there."""
        return self.lines.get(("", name), "")

    def is_protocol(self, name: str) -> bool:
        """Whether users implement the class of this name."""
        return re.search(r"class\((?:.*[ (,])?Protocol\b", self.member(name)) is not None

    def is_record(self, name: str, depth: int = 0) -> bool:
        """Whether the class of this name is constructed from its fields."""
        bases = re.search(r"class\((.*)\)", self.member(name))
        if bases is None or depth > 4:
            return False
        words = [word.split("[")[0].split(".")[-1] for word in bases[1].split(", ")]
        if any(word in _RECORDS for word in words):
            return True
        known = {path.split(".")[-1]: path for kind, path in self.lines if not kind}
        return any(self.is_record(known[word], depth + 1) for word in words if word in known)


def compare(old_text: str, new_text: str) -> list[Change]:
    """Every difference of two dumps."""
    old, new = Surface.read(old_text), Surface.read(new_text)
    gone, come = old.lines.keys() - new.lines.keys(), new.lines.keys() - old.lines.keys()
    found = [_removed(old, *key) for key in gone if ("", _parent(key[1])) not in gone]
    found += [_added(old, *key, new.lines[key]) for key in come if ("", _parent(key[1])) not in come]
    for key in old.lines.keys() & new.lines.keys():
        if old.lines[key] != new.lines[key]:
            found += _changed(old, new, *key)
    return sorted(found)


def _split(line: str) -> tuple[str, str, str]:
    if found := _LABELLED.match(line):
        return found["kind"], found["name"].rstrip(":"), line[found.end() :].strip()
    member = _MEMBER.match(line)
    assert member is not None
    return "", member["name"], member["rest"]


def _removed(old: Surface, kind: str, name: str) -> Change:
    if kind in ("settings-text", "metric-text"):
        return Change(f"{kind} {name}", "is removed", Level.PATCH)
    level = Level.MINOR if kind == "requires" else Level.MAJOR
    return Change(f"{kind} {name}".strip(), "is removed", _softened(old, name, level))


def _added(old: Surface, kind: str, name: str, rest: str) -> Change:
    parent, subject = _parent(name), f"{kind} {name}".strip()
    if kind.endswith("-text"):
        return Change(subject, "is described", Level.PATCH)
    was_configured = any(("settings", parent) == (had, _parent(option)) for had, option in old.lines)
    if kind == "settings" and was_configured and re.search(r": .+ required\b", rest):
        return Change(subject, "is added without a default, so every configuration must give it", Level.MAJOR)
    if not kind and old.is_protocol(parent):
        message = f"is a new member of the Protocol {parent}, which every implementation lacks"
        return Change(subject, message, _softened(old, parent, Level.MAJOR))
    is_field = rest.startswith(":") and " = " not in rest and "ClassVar" not in rest
    if not kind and is_field and old.is_record(parent):
        message = f"is a new field of {parent} without a default, which callers and older peers do not give"
        return Change(subject, message, _softened(old, parent, Level.MAJOR))
    return Change(subject, "is added", Level.MINOR)


def _changed(old: Surface, new: Surface, kind: str, name: str) -> Iterator[Change]:
    before, after = old.lines[kind, name], new.lines[kind, name]
    subject, shown = f"{kind} {name}".strip(), f"changes from `{before.strip()}` to `{after.strip()}`"
    if kind:
        yield Change(subject, shown, _level_of(kind, before, after))
    elif is_function(before) and is_function(after):
        for message, level in compare_functions(before, after, implemented=old.is_protocol(_parent(name))):
            yield Change(subject, message, _softened(old, name, level))
    else:
        yield Change(subject, shown, _softened(old, name, _member_level(name, before.strip(), after.strip())))


def _level_of(kind: str, before: str, after: str) -> Level:
    if kind in ("settings-text", "metric-text", "entry-point"):
        return Level.PATCH  # wording, or the private place of a plug-in
    if kind in ("extra", "requires"):
        return Level.MINOR
    if kind == "metric":
        return Level.PATCH if before.startswith("unknown") else Level.MAJOR
    old, new = _SETTING.fullmatch(before), _SETTING.fullmatch(after)
    if old is None or new is None or old["where"] != new["where"] or (new["limits"] not in (None, old["limits"])):
        return Level.MAJOR
    return Level.MAJOR if new["default"] == "required" else Level.MINOR


def _member_level(name: str, before: str, after: str) -> Level:
    if before.startswith("= ") and after.startswith("= ") and "." in before and "." in after:
        return Level.PATCH  # a name of core that is defined elsewhere; what it is, is compared there
    if name.endswith(" order"):
        return Level.MINOR if after.startswith(before + ", ") else Level.MAJOR
    if "class(" in before and "class(" in after:
        return _class_level(before, after)
    return Level.MINOR if before.startswith(":") and after.startswith(before + " = ") else Level.MAJOR


def _class_level(before: str, after: str) -> Level:
    kept = [_FLAGS.sub(_keep_unless_stability, text).strip() for text in (before, after)]
    if kept[0] == kept[1]:
        return Level.MINOR
    flags = [text.split("class(")[0] for text in kept]
    bases = [text.split("class(")[1].rstrip(")") for text in kept]
    gains = flags[0] == flags[1] and (not bases[0] or bases[1].startswith(bases[0] + ", "))
    return Level.MINOR if gains and "=" not in bases[1].removeprefix(bases[0]) else Level.MAJOR


def _keep_unless_stability(found: re.Match[str]) -> str:
    return "" if found["flag"] in _STABILITY else found[0]


def _softened(old: Surface, name: str, level: Level) -> Level:
    """Experimental things may change in any release, beta ones in a minor release."""
    while name:
        text = old.member(name)
        if "@experimental" in text:
            return min(level, Level.PATCH)
        if "@beta" in text:
            return min(level, Level.MINOR)
        name = _parent(name)
    return level


def _parent(name: str) -> str:
    return (
        name.removesuffix(" order").rpartition(".")[0] if not name.endswith(" order") else name.removesuffix(" order")
    )
