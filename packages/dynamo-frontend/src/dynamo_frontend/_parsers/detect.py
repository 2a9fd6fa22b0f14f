"""Which parsers a model needs, where its worker does not say: what its template and vocabulary show."""

from __future__ import annotations

from collections.abc import Collection

# In order: a family that shares another's marker stands before it.
_TOOL_MARKERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>", "<arg_key>"), "glm47"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("]<]minimax[>[",), "minimax_m3"),
    (("\uff5cDSML\uff5c", "tool_calls"), "deepseek_v4"),
    (("\uff5cDSML\uff5c", "function_calls"), "deepseek_v3_2"),
    (("<|tool_call>", "<tool_call|>"), "gemma4"),
    (("<|channel|>", "<|message|>", "functions."), "harmony"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<\uff5ctool\u2581calls\u2581begin\uff5c>", "```json"), "deepseek_v3"),
    (("<\uff5ctool\u2581calls\u2581begin\uff5c>",), "deepseek_v3_1"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<TOOLCALL>",), "nemotron_deci"),
    (("<tool_call>",), "hermes"),
    (("<|python_tag|>",), "llama3_json"),
)
_REASONING_MARKERS = (
    ("<think>", "</think>", "basic"),
    ("◁think▷", "◁/think▷", "kimi"),
    ("<mm:think>", "</mm:think>", "minimax_m3"),
    ("<|channel>", "<channel|>", "gemma4"),
    ("<|channel|>", "<|message|>", "gpt_oss"),
)


def detect_tool_parser(template: str) -> str:
    """Return the parser of the calls that a chat template shows, or an empty string."""
    for markers, name in _TOOL_MARKERS:
        if all(marker in template for marker in markers):
            return name
    return ""


def detect_reasoning_parser(template: str, added_tokens: Collection[str]) -> str:
    """Return the parser of the reasoning tags that are tokens of their own, or an empty string."""
    for opening, closing, name in _REASONING_MARKERS:
        if opening in added_tokens and closing in added_tokens:
            # A template that ends by opening the reasoning leaves only its end to the model.
            forced = template.rstrip("}{%-' \n\\n\"").endswith(opening)
            return "deepseek_r1" if forced and name == "basic" else name
    return ""
