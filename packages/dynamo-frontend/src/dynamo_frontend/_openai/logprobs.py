"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_core.requests import TokenLogprob
from dynamo_frontend._detokenize import DetokenizerFactory


class LogprobFormat:
    """Shows tokens as text and bytes.

    Args:
        detokenizers: Knows the bytes of a token.
        as_token_ids: Show ``token_id:N`` in place of text.
        top: Alternatives to show for each token.
    """

    def __init__(self, detokenizers: DetokenizerFactory, *, as_token_ids: bool, top: int) -> None:
        self._detokenizers = detokenizers
        self._as_ids = as_token_ids
        self._top = top

    def chat(self, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """Return the ``content`` list of a chat choice."""
        return [
            {
                **self._one(entry.token_id, entry.logprob),
                "top_logprobs": [self._one(top.token_id, top.logprob) for top in entry.top[: self._top]],
            }
            for entry in entries
        ]

    def completion(self, entries: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
        """Return the parallel arrays of a completion choice, and the text offset after them."""
        tokens = [self._text(entry.token_id) for entry in entries]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        found = {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._alternatives(entry) for entry in entries],
            "text_offset": offsets,
        }
        return found, offset

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        found = {self._text(entry.token_id): entry.logprob}
        for top in entry.top[: self._top]:
            found.setdefault(self._text(top.token_id), top.logprob)
        return found

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._detokenizers.token_bytes(token_id)
        return {"token": self._text(token_id), "logprob": logprob, "bytes": list(data)}

    def _text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._detokenizers.token_bytes(token_id).decode("utf-8", "replace")
