"""What a request has accepted so far: the one truth that makes output exactly-once over worker losses."""

from __future__ import annotations

from array import array

from dynamo_core.enums import FinishReason
from dynamo_core.errors import BackendProtocolError
from dynamo_core.requests import GenerateChunk, TokenLogprob
from dynamo_core.tokens import TOKEN_BYTES, PackedTokens, pack_tokens, unpack_tokens


class ChoiceLedger:
    """Accepted tokens of one choice, over all attempts."""

    __slots__ = ("finish_reason", "tokens")

    def __init__(self) -> None:
        self.tokens = array("I")
        self.finish_reason: FinishReason | None = None

    @property
    def open(self) -> bool:
        """Whether more tokens may come."""
        return self.finish_reason is None


class TokenLedger:
    """Accepts chunks by (attempt, choice, first index): duplicates are dropped, holes are errors.

    Args:
        choices: Number of choices.
        max_tokens: Most tokens of one choice; None without a limit.
        needs_logprobs: Whether each token must come with its log-probability.
    """

    def __init__(self, choices: int, *, max_tokens: int | None, needs_logprobs: bool) -> None:
        self.choices = [ChoiceLedger() for _ in range(choices)]
        self.attempt = 0
        self._max_tokens = max_tokens
        self._needs_logprobs = needs_logprobs
        self.open_choices = choices

    @property
    def total_tokens(self) -> int:
        """Accepted tokens of all choices."""
        if len(self.choices) == 1:
            return len(self.choices[0].tokens)
        return sum(len(choice.tokens) for choice in self.choices)

    def accept(self, chunk: GenerateChunk) -> tuple[list[int], tuple[TokenLogprob, ...]]:
        """Return the tokens of a chunk that are new, with their log-probabilities.

        A chunk for a choice that has ended brings nothing. Chunks of earlier attempts must not come here.

        Raises:
            BackendProtocolError: for a hole, tokens that contradict accepted ones, an unknown choice, too many tokens,
                or missing log-probabilities.
        """
        if not 0 <= chunk.choice < len(self.choices):
            raise BackendProtocolError(f"the worker sent choice {chunk.choice} of {len(self.choices)}")
        choice = self.choices[chunk.choice]
        if choice.finish_reason is not None or not chunk.token_ids:
            return [], ()
        packed = chunk.token_ids
        known = len(choice.tokens)
        # One token a chunk is the common case, and need not pass through a view.
        tokens = [int.from_bytes(packed, "little")] if len(packed) == TOKEN_BYTES else list(unpack_tokens(packed))
        overlap = known - chunk.first_index
        if overlap < 0:
            raise BackendProtocolError(
                f"the worker's tokens jump from {known} to {chunk.first_index}", reason="backend.stream_incomplete"
            )
        if overlap:
            tokens = self._drop_known(choice, tokens, chunk.first_index, overlap)
        logprobs = self._logprobs(chunk, overlap, len(tokens)) if self._needs_logprobs else ()
        if self._max_tokens is not None and known + len(tokens) > self._max_tokens:
            raise BackendProtocolError(f"the worker sent more than {self._max_tokens} tokens")
        choice.tokens.extend(tokens)
        return tokens, logprobs

    def finish(self, choice: int, reason: FinishReason) -> bool:
        """End a choice; return whether it was open."""
        ledger = self.choices[choice]
        if ledger.finish_reason is not None:
            return False
        ledger.finish_reason = reason
        self.open_choices -= 1
        return True

    def truncate(self, choice: int, length: int) -> None:
        """Forget tokens behind a stop string."""
        del self.choices[choice].tokens[length:]

    def continuation(self, prompt: PackedTokens) -> PackedTokens:
        """Return the prompt followed by what the only choice has accepted."""
        return PackedTokens(prompt + pack_tokens(self.choices[0].tokens))

    def _drop_known(self, choice: ChoiceLedger, tokens: list[int], first: int, overlap: int) -> list[int]:
        expected = choice.tokens[first : first + len(tokens)].tolist()
        if tokens[:overlap] != expected:
            raise BackendProtocolError(
                f"the worker's tokens at {first} differ from those already delivered", reason="backend.protocol"
            )
        return tokens[overlap:]

    def _logprobs(self, chunk: GenerateChunk, overlap: int, fresh: int) -> tuple[TokenLogprob, ...]:
        found = chunk.logprobs[overlap:] if overlap else chunk.logprobs
        if len(found) != fresh:
            raise BackendProtocolError(f"the worker sent {len(found)} log-probabilities for {fresh} tokens")
        return found
