"""Readers of tool-call bodies. Each returns an empty list for text that is no call."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from dynamo_frontend._parsers.contract import ToolCallDelta, Tools

MAX_DEPTH = 64
_NAME_KEYS = ("name", "function_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args")
_XML_FUNCTION = re.compile(r"<function=([^>\s]+)\s*>(.*?)</function>", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\s]+)\s*>\n?(.*?)\n?</parameter>", re.DOTALL)
_INVOKE = re.compile(r'<invoke name="?([^">]+)"?\s*>(.*?)</invoke>', re.DOTALL)
_INVOKE_PARAMETER = re.compile(r'<parameter name="?([^">]+)"?\s*>\n?(.*?)\n?</parameter>', re.DOTALL)
_GLM_NAME = re.compile(r"\s*([^\s<]+)\s*(?=<arg_key>|$)")
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_KIMI_CALL = re.compile(
    r"<\|tool_call_begin\|>\s*(?:functions\.)?([\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>",
    re.DOTALL,
)
_DEEPSEEK_CALL = re.compile(
    "<\uff5ctool\u2581call\u2581begin\uff5c>(.*?)<\uff5ctool\u2581call\u2581end\uff5c>", re.DOTALL
)
_FENCE = re.compile(r"```(?:json)?\n?(.*?)\n?```", re.DOTALL)


def read_json(body: str, tools: Tools) -> list[ToolCallDelta]:
    """One call as a JSON object, or several as a list of them."""
    try:
        loaded = json.loads(body)
    except (ValueError, RecursionError):
        return []
    return _calls_of(loaded)


def read_arguments(name: str) -> Callable[[str, Tools], list[ToolCallDelta]]:
    """Return a reader of the bare arguments of one known function."""

    def read(body: str, tools: Tools) -> list[ToolCallDelta]:
        arguments = _json_object(body)
        return [] if arguments is None else [ToolCallDelta(name, arguments)]

    return read


def read_json_lines(body: str, tools: Tools) -> list[ToolCallDelta]:
    """JSON objects one after the other, separated by white space, ``;`` or ``,``."""
    decoder = json.JSONDecoder()
    found: list[ToolCallDelta] = []
    place = 0
    text = body.strip()
    while place < len(text):
        try:
            loaded, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        calls = _calls_of(loaded)
        if not calls:
            return []
        found.extend(calls)
        while place < len(text) and (text[place].isspace() or text[place] in ";,"):
            place += 1
    return found


def read_mistral(body: str, tools: Tools) -> list[ToolCallDelta]:
    """A JSON list of calls, or ``name{...}`` / ``name[ARGS]{...}`` pairs as newer models write them."""
    calls = read_json(body, tools)
    if calls:
        return calls
    found: list[ToolCallDelta] = []
    for part in filter(None, (piece.strip() for piece in body.split("[TOOL_CALLS]"))):
        name, brace, rest = part.partition("{")
        arguments = _json_object(brace + rest)
        if arguments is None:
            return []
        found.append(ToolCallDelta(name.removesuffix("[ARGS]").strip(), arguments))
    return [call for call in found if call.name]


def read_xml_functions(body: str, tools: Tools) -> list[ToolCallDelta]:
    """``<function=name><parameter=key>value</parameter></function>``."""
    return [_typed_call(name, _XML_PARAMETER.findall(content), tools) for name, content in _XML_FUNCTION.findall(body)]


def read_invokes(body: str, tools: Tools) -> list[ToolCallDelta]:
    """``<invoke name="..."><parameter name="...">value</parameter></invoke>``."""
    return [_typed_call(name, _INVOKE_PARAMETER.findall(content), tools) for name, content in _INVOKE.findall(body)]


def read_glm(body: str, tools: Tools) -> list[ToolCallDelta]:
    """A name, followed by ``<arg_key>``/``<arg_value>`` pairs."""
    name = _GLM_NAME.match(body)
    return [_typed_call(name[1], _GLM_ARGUMENT.findall(body), tools)] if name else []


def read_kimi(body: str, tools: Tools) -> list[ToolCallDelta]:
    """``functions.name:0`` and JSON arguments between markers."""
    found: list[ToolCallDelta] = []
    for name, text in _KIMI_CALL.findall(body):
        arguments = _json_object(text)
        if arguments is None:
            return []
        found.append(ToolCallDelta(name, arguments))
    return found


def read_deepseek(body: str, tools: Tools) -> list[ToolCallDelta]:
    """``name<sep>{...}``, or ``function<sep>name`` with the arguments in a fence as the first models wrote it."""
    found: list[ToolCallDelta] = []
    for content in _DEEPSEEK_CALL.findall(body):
        first, _, rest = content.partition("<\uff5ctool\u2581sep\uff5c>")
        fenced = _FENCE.search(rest)
        name = rest[: fenced.start()].strip() if fenced else first.strip()
        arguments = _json_object(fenced[1] if fenced else rest)
        if arguments is None or not name:
            return []
        found.append(ToolCallDelta(name, arguments))
    return found


def read_pythonic(body: str, tools: Tools) -> list[ToolCallDelta]:
    """A Python list of calls with keyword arguments. Parsed, never run."""
    text = body.strip()
    try:
        tree = ast.parse(text if text.startswith("[") else f"[{text}]", mode="eval")
        elements = tree.body.elts if isinstance(tree.body, ast.List) else []
        return [_python_call(element) for element in elements]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _python_call(node: ast.expr) -> ToolCallDelta:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with keyword arguments")
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    return ToolCallDelta(ast.unparse(node.func), _dump(arguments))


def _calls_of(loaded: Any) -> list[ToolCallDelta]:
    items = cast("list[Any]", loaded) if isinstance(loaded, list) else [loaded]
    calls = [_call_of(item) for item in items]
    return [call for call in calls if call is not None] if all(calls) else []


def _call_of(item: Any) -> ToolCallDelta | None:
    if not isinstance(item, dict):
        return None
    fields = cast("dict[str, Any]", item)
    name = next((fields[key] for key in _NAME_KEYS if key in fields), None)
    if not isinstance(name, str) or not name:
        return None
    arguments = next((fields[key] for key in _ARGUMENT_KEYS if key in fields), {})
    return ToolCallDelta(name, arguments if isinstance(arguments, str) else _dump(arguments))


def _typed_call(name: str, arguments: list[tuple[str, str]], tools: Tools) -> ToolCallDelta:
    """Return a call whose values, written as text, have the types of the tool's schema."""
    schema = _properties(name.strip(), tools)
    typed = {key.strip(): _typed(value, schema.get(key.strip())) for key, value in arguments}
    return ToolCallDelta(name.strip(), _dump(typed))


def _properties(name: str, tools: Tools) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            return cast("Mapping[str, Any]", (function.get("parameters") or {}).get("properties") or {})
    return {}


def _typed(value: str, schema: Any) -> Any:
    kind = cast("Mapping[str, Any]", schema).get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _json_object(text: str) -> str | None:
    """Return the text if it is a JSON object."""
    text = text.strip()
    try:
        return text if isinstance(json.loads(text), dict) else None
    except (ValueError, RecursionError):
        return None


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
