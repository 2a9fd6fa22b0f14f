"""The next token of each sequence, from its logits.

Order, as vLLM has it: log-probabilities are taken from the model's own distribution; then bans (minimum length,
allowed ids, the output's grammar), logit bias, repetition, presence and frequency penalties; then greedy choice, or
temperature, min-p, top-k, top-p and a draw. The draw inverts the cumulative distribution at one uniform number, and
that number is a function of (seed, choice, output position) alone.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynamo_core.requests import SamplingOptions, TokenLogprob, TopLogprob
from dynamo_worker._reference._sequence import Sequence
from dynamo_worker._reference._uniforms import uniforms

Floats = npt.NDArray[np.float32]


class SampledToken(NamedTuple):
    """One drawn token."""

    token_id: int
    logprob: TokenLogprob | None = None


def sample(logits: Floats, sequences: Items[Sequence], end_tokens: Items[Collection[int]]) -> list[SampledToken]:
    """Draw one token for each sequence.

    Args:
        logits: ``[sequences, vocab_size]``; overwritten.
        sequences: Whose turn it is, in row order.
        end_tokens: Per sequence the tokens that would end it, banned below its minimum length.
    """
    logprobs = _Logprobs(logits, sequences)
    for row, sequence, ends in zip(logits, sequences, end_tokens, strict=True):
        if sequence.adjusts_logits or sequence.grammar is not None:
            _adjust(row, sequence, ends)
    chosen = logits.argmax(axis=-1)
    drawn = [index for index, item in enumerate(sequences) if item.request.sampling.temperature > 0]
    if drawn:
        chosen[drawn] = _draw(logits[drawn].astype(np.float64), [sequences[index] for index in drawn])
    return [SampledToken(token, logprobs.of(row, token)) for row, token in enumerate(chosen.tolist())]


class _Logprobs:
    """Log-probabilities of the rows whose requests ask for them."""

    def __init__(self, logits: Floats, sequences: Items[Sequence]) -> None:
        self._wanted = {
            index: item.request.output.logprobs
            for index, item in enumerate(sequences)
            if item.request.output.logprobs is not None
        }
        self._rows = {index: _log_softmax(logits[index]) for index in self._wanted}

    def of(self, row: int, token: int) -> TokenLogprob | None:
        count = self._wanted.get(row)
        if count is None:
            return None
        values = self._rows[row]
        best = np.argsort(-values, kind="stable")[:count].tolist() if count else []
        return TokenLogprob(token, float(values[token]), tuple(TopLogprob(i, float(values[i])) for i in best))


def _adjust(row: Floats, sequence: Sequence, ends: Collection[int]) -> None:
    options = sequence.request.sampling
    if sequence.num_output_tokens < sequence.request.stop.min_tokens and ends:
        row[list(ends)] = -np.inf
    if options.allowed_token_ids:
        banned = np.ones(len(row), dtype=np.bool_)
        banned[list(options.allowed_token_ids)] = False
        row[banned] = -np.inf
    if sequence.grammar is not None:
        sequence.grammar.ban(row, ends)
    if options.logit_bias:
        row[list(options.logit_bias)] += np.array(list(options.logit_bias.values()), dtype=np.float32)
    _penalize(row, sequence, options)


def _penalize(row: Floats, sequence: Sequence, options: SamplingOptions) -> None:
    if options.repetition_penalty != 1.0:
        seen = np.unique(np.frombuffer(sequence.tokens, dtype=np.uint32))
        factor = np.float32(options.repetition_penalty)
        row[seen] = np.where(row[seen] > 0, row[seen] / factor, row[seen] * factor)
    if options.presence_penalty or options.frequency_penalty:
        output = np.frombuffer(sequence.tokens, dtype=np.uint32)[sequence.num_prompt_tokens :]
        used, counts = np.unique(output, return_counts=True)
        row[used] -= np.float32(options.presence_penalty) + np.float32(options.frequency_penalty) * counts


def _draw(logits: npt.NDArray[np.float64], sequences: Items[Sequence]) -> npt.NDArray[np.int64]:
    options = [sequence.request.sampling for sequence in sequences]
    logits /= np.array([item.temperature for item in options])[:, None]
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    min_p = np.array([item.min_p for item in options])[:, None]
    weights[weights < min_p] = 0.0  # the best token has weight 1
    if any(item.top_k > 0 or item.top_p < 1.0 for item in options):
        _cut_tail(weights, options)
    cumulative = weights.cumsum(axis=-1)
    points = uniforms(
        np.array([sequence.seed for sequence in sequences], dtype=np.uint64),
        np.array([sequence.choice for sequence in sequences], dtype=np.uint64),
        np.array([sequence.num_output_tokens for sequence in sequences], dtype=np.uint64),
    )
    return (cumulative <= (points * cumulative[:, -1])[:, None]).sum(axis=-1)


def _cut_tail(weights: npt.NDArray[np.float64], options: Items[SamplingOptions]) -> None:
    vocabulary = weights.shape[-1]
    top_k = np.array([item.top_k if item.top_k > 0 else vocabulary for item in options])[:, None]
    top_p = np.array([item.top_p for item in options])[:, None]
    order = np.argsort(-weights, axis=-1, kind="stable")
    ranked = np.take_along_axis(weights, order, axis=-1)
    ranked[np.arange(vocabulary) >= top_k] = 0.0
    before = ranked.cumsum(axis=-1) - ranked
    ranked[before >= top_p * ranked.sum(axis=-1, keepdims=True)] = 0.0
    np.put_along_axis(weights, order, ranked, axis=-1)


def _log_softmax(row: Floats) -> npt.NDArray[np.float64]:
    shifted = row.astype(np.float64) - float(row.max())
    return shifted - np.log(np.exp(shifted).sum())
