"""Output constraints: a JSON schema, regular expression, grammar or list of choices as a mask over the vocabulary.

A ``GrammarCompiler`` turns a constraint into a ``Grammar`` once and keeps it; each constrained choice owns a fork,
which follows the tokens that the choice accepts. The parser is llguidance, loaded with the first constrained request.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GenerateRequest, GuidedDecoding
from dynamo_core.tokens import unpack_tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT_GRAMMARS = 128
BACKENDS = (None, "auto", "guidance", "llguidance")
# Free whitespace between the parts of a document lets a weak model fill its budget with it. One space is allowed.
_JSON_OPTIONS: Any = {"whitespace_pattern": " {0,1}", "lenient": False}


class Grammar:
    """Where one choice is in its constraint.

    Args:
        matcher: The parser at that place.
        eos_token_ids: End tokens of the model, which the parser itself allows where the text may end.
    """

    def __init__(self, matcher: LLMatcher, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = list(eos_token_ids)

    @property
    def is_complete(self) -> bool:
        """Whether the text satisfies the constraint and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fork(self) -> Grammar:
        """Return another one at the same place."""
        return Grammar(self._matcher.deep_copy(), self._eos_token_ids)

    def accept(self, tokens: Sequence[int]) -> bool:
        """Go on by tokens; False if the constraint does not allow them."""
        return self._matcher.consume_tokens(list(tokens))

    def allowed(self, end_tokens: Collection[int], vocab_size: int) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next, ``[vocab_size]``. End tokens may where the text is complete.

        Raises:
            InvalidRequestError: if the constraint costs more to follow than the parser's limits allow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(np.bool_)
        allowed[self._eos_token_ids] = False
        if self._matcher.is_accepting():
            allowed[list(end_tokens)] = True
        if self._matcher.is_error() or not allowed.any():
            raise _refusal(f"cannot be followed: {_first_line(self._matcher.get_error()) or 'no token fits'}")
        return allowed

    def ban(self, logits: npt.NDArray[np.float32], end_tokens: Collection[int]) -> None:
        """Set the logits of all tokens that may not come next to minus infinity, in place.

        Raises:
            InvalidRequestError: as ``allowed``, and if every token that may come next is banned already.
        """
        logits[~self.allowed(end_tokens, len(logits))] = -np.inf
        if logits.max() == -np.inf:
            raise _refusal("leaves only tokens that min_tokens forbids; lower min_tokens or drop their stop_token_ids")


class GrammarCompiler:
    """Grammars over the tokens of one model. ``kept`` belongs on the event loop, ``prepare`` on a worker thread.

    Args:
        folder: The model's folder, with its ``tokenizer.json``.
        vocab_size: Size of the model's vocabulary.
        eos_token_ids: End tokens of the model.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._file = folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._text_tokens = np.ones(vocab_size, dtype=np.bool_)
        self._text_tokens[self._eos_token_ids] = False
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[bytes, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def is_available(self) -> bool:
        """Whether constraints can be followed: the parser is installed, and the model says what its tokens spell."""
        return self._file.is_file() and bool(self._eos_token_ids) and util.find_spec("llguidance") is not None

    def kept(self, guided: GuidedDecoding) -> Grammar | None:
        """Return the grammar of a constraint that was seen lately. Cheap."""
        key = _key(guided)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def prepare(self, request: GenerateRequest) -> Grammar:
        """Return the grammar of a request behind the output that it continues. Blocks, for a hard constraint long.

        Raises:
            InvalidRequestError: if the constraint is wrong, too complex, or not met by the output so far.
        """
        guided = request.sampling.guided
        assert guided is not None
        grammar = (self.kept(guided) or self._compile(guided)).fork()
        output = unpack_tokens(request.token_ids)[request.prompt_tokens :] if request.accepted_tokens else ()
        if not grammar.accept(output):
            raise InvalidRequestError(
                "token_ids continues an output that the constraint does not allow; continue it with the constraint it "
                "began with",
                param="token_ids",
            )
        return grammar

    def _compile(self, guided: GuidedDecoding) -> Grammar:
        from llguidance import LLMatcher

        with self._lock:
            tokenizer = self._tokenizer = self._tokenizer or self._load_tokenizer()
        matcher = LLMatcher(tokenizer, _source(guided), log_level=0)
        if matcher.is_error():
            raise _refusal(f"cannot be used: {_first_line(matcher.get_error())}")
        grammar = Grammar(matcher, self._eos_token_ids)
        # The first mask builds what every fork shares: here, and not between the steps of a batch.
        if not grammar.allowed(self._eos_token_ids, self._vocab_size).any(where=self._text_tokens):
            raise _refusal("allows the empty text only; allow some text")
        with self._lock:
            self._kept[_key(guided)] = grammar
            while len(self._kept) > MAX_KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return grammar

    def _load_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = self._file.read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)


def require_usable(guided: GuidedDecoding) -> None:
    """Check what can be checked of a constraint without its grammar.

    Raises:
        InvalidRequestError: naming the field, its value and the remedy.
    """
    if guided.backend not in BACKENDS:
        raise _refusal(f"names the backend {guided.backend!r}; the reference engine has llguidance, leave it out")
    unsupported = {"structural_tag": guided.structural_tag, "whitespace_pattern": guided.whitespace_pattern}
    for name, value in unsupported.items():
        if value is not None:
            raise _refusal(f"has {name}, which the reference engine does not offer; use json, regex, choice or grammar")
    if (guided.json, guided.regex, guided.grammar, guided.choice) == (None, None, None, ()):
        raise _refusal("names no constraint; give json, regex, choice or grammar, or leave it out")
    if "" in guided.choice:
        raise _refusal("has an empty choice; every choice needs text")


def _source(guided: GuidedDecoding) -> str:
    from llguidance import LLMatcher, grammar_from

    try:
        if guided.json is not None:
            return LLMatcher.grammar_from_json_schema(_schema(guided.json), overrides=_JSON_OPTIONS)
        if guided.regex is not None:
            return LLMatcher.grammar_from_regex(guided.regex)
        if guided.choice:
            return LLMatcher.grammar_from_lark(
                "start: " + " | ".join(json.dumps(item, ensure_ascii=False) for item in guided.choice)
            )
        return grammar_from("grammar", guided.grammar or "")
    except (TypeError, ValueError) as error:
        raise _refusal(f"cannot be used: {_first_line(str(error))}") from error


def _schema(given: Any) -> str:
    """Return a schema as text; it may be given as text already, and must be an object or a boolean."""
    schema: Any = json.loads(given) if isinstance(given, str) else given
    if not isinstance(schema, (dict, bool)):
        raise _refusal("has a JSON schema that is not an object; give an object")
    return json.dumps(schema)


def _key(guided: GuidedDecoding) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(guided, backend=None))


def _first_line(message: str) -> str:
    return message.strip().split("\n", maxsplit=1)[0][:300]


def _refusal(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"guided {problem}", param="guided")
