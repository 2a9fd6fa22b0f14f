"""What was found out about the server."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+([-+0-9.eEinfNa]+)", re.MULTILINE)
_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')


class OutputForm(enum.Enum):
    """How the server gives its output."""

    TOKEN_IDS = "token_ids"
    LOGPROBS = "logprobs"
    TEXT = "text"


@dataclass(frozen=True)
class ServerFacts:
    """Abilities of a server.

    Attributes:
        remote_model: Its name of the model.
        takes_tokens: Whether prompts are token ids.
        output: How it gives output; ``LOGPROBS`` means ids inside log-probabilities.
        context_length: Most tokens of prompt and output; 0 if it does not say.
        model_path: Local folder of the model; empty if unknown.
        kv_block_size: Tokens a KV block; 0 if unknown.
        total_kv_blocks: KV blocks of a rank, if it says.
    """

    remote_model: str
    takes_tokens: bool = False
    output: OutputForm = OutputForm.TEXT
    context_length: int = 0
    model_path: str = ""
    kv_block_size: int = 0
    total_kv_blocks: int | None = None


@dataclass(frozen=True)
class Samples:
    """Prometheus text as numbers.

    Attributes:
        values: Sum over all label sets, by metric name.
        labels: Labels of the last sample, by metric name.
    """

    values: dict[str, float] = field(default_factory=dict[str, float])
    labels: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    @classmethod
    def parse(cls, text: str) -> Samples:
        """Read an exposition; lines that are no samples are left out."""
        samples = cls()
        for name, labels, value in _SAMPLE.findall(text):
            try:
                samples.values[name] = samples.values.get(name, 0.0) + float(value)
            except ValueError:
                continue
            samples.labels[name] = dict(_LABEL.findall(labels))
        return samples

    def first(self, *names: str) -> float | None:
        """Return the value of the first of these metrics that exists."""
        return next((self.values[name] for name in names if name in self.values), None)
