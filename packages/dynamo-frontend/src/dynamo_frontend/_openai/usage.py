"""Token accounting in OpenAI's form."""

from __future__ import annotations

from typing import Any

from dynamo_core.requests import Usage


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return the ``usage`` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
