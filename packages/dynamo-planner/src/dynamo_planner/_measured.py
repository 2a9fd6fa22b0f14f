"""Timing from measured profiles."""

from __future__ import annotations

from pathlib import Path

from dynamo_planner._profile import DecodeProfile, PrefillProfile, load_decode_profile, load_prefill_profile


class ProfileTiming:
    """Step times read off a prefill and a decode profile.

    Args:
        prefill: Prefill profile.
        decode: Decode profile.
        max_num_seqs: Requests that run at once.
    """

    def __init__(self, prefill: PrefillProfile, decode: DecodeProfile, *, max_num_seqs: int = 256) -> None:
        self._prefill = prefill
        self._decode = decode
        self.max_num_seqs = max_num_seqs
        self.max_kv_tokens = decode.max_kv_tokens

    @classmethod
    def load(cls, folder: Path, *, max_num_seqs: int = 256) -> ProfileTiming:
        """Read both profiles of a folder.

        Raises:
            ConfigurationError: if one is missing or cannot be read.
        """
        return cls(load_prefill_profile(folder), load_decode_profile(folder), max_num_seqs=max_num_seqs)

    def prefill_s(self, tokens: float) -> float:
        """Return the measured time to first token, scaled in proportion beyond the longest prompt measured."""
        if tokens <= 0:
            return 0.0
        beyond = max(1.0, tokens / self._prefill.max_isl)
        return max(self._prefill.ttft_s(tokens), 0.0) * beyond

    def decode_s(self, requests: float, context_tokens: float) -> float:
        """Return the measured inter-token latency."""
        return max(self._decode.itl_s(requests, context_tokens), 0.0)
