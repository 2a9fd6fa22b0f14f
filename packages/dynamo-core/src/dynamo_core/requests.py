"""The generation request, its options, and the chunks that answer it.

Every field but the identity ones has a default, unknown fields are ignored, so release N and N-1 read each other.
``GenerateChunk`` is encoded as an array for speed: its fields are append-only.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dynamo_core.content import ContentPart
from dynamo_core.enums import FinishReason, Modality
from dynamo_core.errors import ErrorRecord, InvalidRequestError
from dynamo_core.kv import BlockHints
from dynamo_core.tokens import PackedTokens, token_count

_NO_TOKENS = PackedTokens(b"")


class StopConditions(msgspec.Struct, frozen=True, omit_defaults=True):
    """When a choice ends. Stop strings and stop tokens are not part of the returned text.

    Attributes:
        max_tokens: Most new tokens; None means the engine's remaining context.
        min_tokens: No end of any kind before this many new tokens.
        stop: Stop strings; the engine cannot see them, the frontend applies them.
        stop_token_ids: Token ids that end the choice.
        ignore_eos: Go on past the model's own end; clears the effect of ``eos_token_ids``.
        max_thinking_tokens: Most tokens inside a reasoning block.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_thinking_tokens: int | None = None


class GuidedDecoding(msgspec.Struct, frozen=True, omit_defaults=True):
    """Constraint on the output; exactly one of the first six fields may be set."""

    json: Any = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    whitespace_pattern: str | None = None
    structural_tag: Any = None
    backend: str | None = None

    def __post_init__(self) -> None:
        named = ("json", "regex", "choice", "grammar", "whitespace_pattern", "structural_tag")
        given = [name for name in named if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise InvalidRequestError(
                f"guided decoding takes one constraint, got {' and '.join(given)}; keep one", param=given[1]
            )


class SamplingOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn.

    ``temperature`` 0 is greedy. ``top_k`` -1 or 0 keeps all tokens. ``seed`` makes a draw a function of (seed, choice,
    position), so a request that continues on another worker draws the same tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    guided: GuidedDecoding | None = None


class OutputOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the output carries besides tokens.

    Attributes:
        logprobs: None for none, else how many top alternatives (0 gives the chosen token's only).
        prompt_logprobs: The same for prompt tokens.
        skip_special_tokens: Leave special tokens out of the text.
        modality: What is asked for.
    """

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    modality: Modality = Modality.TEXT


class RoutingHints(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the caller asks of the router; all optional.

    ``deadline_s`` is how many seconds from now the request is worth waiting for a worker, None for no limit; it orders
    requests that wait.
    """

    instance_id: int | None = None
    dp_rank: int | None = None
    prefill_instance_id: int | None = None
    prefill_dp_rank: int | None = None
    expected_output_tokens: int | None = None
    lora: str = ""
    cache_salt: str = ""
    priority: int = 0
    policy_class: str = ""
    session_id: str = ""
    tenant: str = ""
    allowed_instance_ids: tuple[int, ...] = ()
    excluded_instance_ids: tuple[int, ...] = ()
    required_taints: tuple[str, ...] = ()
    preferred_taints: dict[str, float] = {}
    deadline_s: float | None = None


class PrefillResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a prefill worker hands to the decode worker.

    Attributes:
        parameters: Engine-specific hand-off data.
        token_ids: Tokens that the prefill worker already sampled, packed.
        cached_tokens: Prompt tokens that its cache already held.
    """

    parameters: dict[str, Any] = {}
    token_ids: PackedTokens = _NO_TOKENS
    cached_tokens: int = 0


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request to an engine.

    Attributes:
        request_id: Identity over all attempts.
        model: Model or LoRA name as registered.
        token_ids: Prompt, packed; on a continuation: prompt and accepted tokens.
        parts: Content besides the prompt tokens, in order.
        modality: What kind of request this is.
        attempt: 0 for the first worker, one more for each continuation.
        prompt_tokens: Length of the original prompt when ``token_ids`` carries accepted tokens too, else 0.
        handoff: Result of a separate prefill or encode worker.
        deadline_s: Seconds left when the request was sent; None for no limit.
        health_check: True for a canary of the process host; engines answer it like any other request.
        extra: Engine-specific arguments.
        block_hints: What is known of the future of its KV blocks, for whoever keeps them.
    """

    request_id: str
    model: str
    token_ids: PackedTokens = _NO_TOKENS
    parts: tuple[ContentPart, ...] = ()
    modality: Modality = Modality.TEXT
    # Records with dictionaries inside are made for each request: a shared default could be changed for all.
    sampling: SamplingOptions = msgspec.field(default_factory=SamplingOptions)
    stop: StopConditions = StopConditions()
    output: OutputOptions = OutputOptions()
    routing: RoutingHints = msgspec.field(default_factory=RoutingHints)
    eos_token_ids: tuple[int, ...] = ()
    attempt: int = 0
    prompt_tokens: int = 0
    handoff: PrefillResult | None = None
    deadline_s: float | None = None
    health_check: bool = False
    extra: dict[str, Any] = {}
    block_hints: BlockHints | None = None

    @property
    def accepted_tokens(self) -> int:
        """How many of ``token_ids`` were already generated by an earlier attempt."""
        return token_count(self.token_ids) - self.prompt_tokens if self.prompt_tokens else 0


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Token accounting of one choice set."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One alternative token with its natural-log probability."""

    token_id: int
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of the chosen token, and the best alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class GenerateChunk(msgspec.Struct, frozen=True, array_like=True):
    """New output of one choice. Fields are append-only: the wire form is an array.

    ``(request, attempt, choice, first_index)`` places the tokens, so a receiver drops duplicates and sees holes.

    Attributes:
        token_ids: New tokens only, packed.
        first_index: Index of the first of them among all tokens generated for this choice, over all attempts.
        choice: Which choice.
        attempt: Attempt that produced it.
        finish_reason: Set on a choice's last chunk only.
        stop_token_id: Token that ended the choice, if one did. It is not in ``token_ids``.
        usage: Set on the last chunk of the last choice.
        logprobs: One entry a token, if asked for.
        text: Output text, from engines that detokenise themselves.
        parts: Output that is not tokens.
        handoff: What the next worker needs, from prefill and encode workers.
        error: What went wrong, with ``FinishReason.ERROR``.
        extra: Engine-specific data.
    """

    token_ids: PackedTokens = _NO_TOKENS
    first_index: int = 0
    choice: int = 0
    attempt: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    text: str | None = None
    parts: tuple[ContentPart, ...] = ()
    handoff: PrefillResult | None = None
    error: ErrorRecord | None = None
    extra: dict[str, Any] | None = None
