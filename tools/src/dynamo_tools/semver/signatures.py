"""Two signatures of one function, as a dump writes them.

A caller gives arguments and takes a result; who implements a Protocol takes arguments and gives a result. So what
widens for the one narrows for the other, and for a member of a Protocol every change of types is a break.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dynamo_tools.semver.change import Level

Found = tuple[str, Level]
_HEAD = re.compile(r"^ (?P<flags>(?:@\S.*? )*?)(?P<kind>(?:async )?def(?: staticmethod| classmethod| property)*)\(")
_STABILITY = ("@beta", "@experimental", "@deprecated")


@dataclass(frozen=True)
class _Parameter:
    kind: str
    annotation: str
    default: str | None
    position: int


@dataclass(frozen=True)
class _Signature:
    kind: str
    flags: str
    parameters: dict[str, _Parameter]
    returns: str


def is_function(text: str) -> bool:
    """Whether this line of a dump is one function: overloads are several lines."""
    return _HEAD.match(text) is not None and "\n" not in text


def compare_functions(old_text: str, new_text: str, *, implemented: bool) -> Iterator[Found]:
    """What changed between two lines.

    Args:
        old_text: Line of the release, without the name.
        new_text: Line of the checkout.
        implemented: Whether users implement the function, as a member of a Protocol.
    """
    old, new = _read(old_text), _read(new_text)
    if old.kind != new.kind:
        yield f"changes from `{old.kind}` to `{new.kind}`", Level.MAJOR
    if old.flags != new.flags:
        stability = all(mark.startswith(_STABILITY) for mark in _marks(old.flags) ^ _marks(new.flags))
        yield f"changes its marks from `{old.flags}` to `{new.flags}`", Level.MINOR if stability else Level.MAJOR
    yield from _parameters(old, new, implemented)
    if old.returns != new.returns:
        narrower = bool(new.returns) and _union(new.returns) < _union(old.returns)
        level = Level.MINOR if narrower and not implemented else Level.MAJOR
        yield f"returns `{new.returns}` in place of `{old.returns}`", level


def _marks(flags: str) -> set[str]:
    return set(re.findall(r"@\w+(?:\([^)]*\))?", flags))


def _parameters(old: _Signature, new: _Signature, implemented: bool) -> Iterator[Found]:
    for name in old.parameters.keys() - new.parameters.keys():
        yield f"loses the parameter {name}", Level.MAJOR
    for name in new.parameters.keys() - old.parameters.keys():
        parameter = new.parameters[name]
        optional = parameter.default is not None or parameter.kind.startswith("var")
        level = Level.MINOR if optional and not implemented else Level.MAJOR
        yield f"gains the {'optional' if optional else 'required'} parameter {name}", level
    for name in old.parameters.keys() & new.parameters.keys():
        yield from _parameter(name, old.parameters[name], new.parameters[name], implemented)
    kept = [name for name in old.parameters if name in new.parameters and _is_positional(new.parameters[name])]
    for name in kept:
        if _is_positional(old.parameters[name]) and old.parameters[name].position != new.parameters[name].position:
            yield f"moves the positional parameter {name}", Level.MAJOR


def _parameter(name: str, old: _Parameter, new: _Parameter, implemented: bool) -> Iterator[Found]:
    if old.kind != new.kind:
        looser = new.kind == "plain" and old.kind in ("keyword", "positional")
        level = Level.MINOR if looser and not implemented else Level.MAJOR
        yield f"takes {name} as {new.kind} in place of {old.kind}", level
    if old.annotation != new.annotation:
        wider = not old.annotation or (bool(new.annotation) and _union(old.annotation) < _union(new.annotation))
        level = Level.MINOR if wider and not implemented else Level.MAJOR
        yield f"takes {name} as `{new.annotation}` in place of `{old.annotation}`", level
    if old.default != new.default:
        level = Level.MINOR if old.default is None and not implemented else Level.MAJOR
        yield f"changes the default of {name} from `{old.default}` to `{new.default}`", level


def _read(text: str) -> _Signature:
    head = _HEAD.match(text)
    assert head is not None
    tree = ast.parse(f"def f{text[head.end() - 1 :]}: ...").body[0]
    assert isinstance(tree, ast.FunctionDef)
    returns = ast.unparse(tree.returns) if tree.returns else ""
    return _Signature(head["kind"], head["flags"].strip(), _arguments(tree.args), returns)


def _arguments(listed: ast.arguments) -> dict[str, _Parameter]:
    plain = [*listed.posonlyargs, *listed.args]
    defaults = [None] * (len(plain) - len(listed.defaults)) + listed.defaults
    found: dict[str, _Parameter] = {}
    for position, (item, default) in enumerate(zip(plain, defaults, strict=True)):
        kind = "positional" if position < len(listed.posonlyargs) else "plain"
        found[item.arg] = _Parameter(kind, _text(item.annotation), _text(default) or None, position)
    for item, default in zip(listed.kwonlyargs, listed.kw_defaults, strict=True):
        found[item.arg] = _Parameter("keyword", _text(item.annotation), _text(default) or None, -1)
    for kind, item in (("var-positional", listed.vararg), ("var-keyword", listed.kwarg)):
        if item is not None:
            found[item.arg] = _Parameter(kind, _text(item.annotation), None, -1)
    return found


def _is_positional(parameter: _Parameter) -> bool:
    return parameter.position >= 0


def _text(node: ast.expr | None) -> str:
    return ast.unparse(node) if node is not None else ""


def _union(annotation: str) -> set[str]:
    """Members of a union, as text."""
    parts: set[str] = set()
    stack: list[ast.expr] = [ast.parse(annotation, mode="eval").body]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            stack += [node.left, node.right]
        else:
            parts.add(ast.unparse(node))
    return parts
