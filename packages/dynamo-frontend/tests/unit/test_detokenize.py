"""Incremental text equals whole decoding, wherever the tokens are cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dynamo_frontend._detokenize import DetokenizerFactory, StreamDetokenizer

EXTRA = "<|im_start|> <tool_call> </think> 日本語 Größe 🎌🏳️‍🌈"


def cut(ids, sizes):
    start = 0
    for size in sizes:
        yield ids[start : start + size]
        start += size
    yield ids[start:]


def stream(detokenizer, pieces):
    return "".join([detokenizer.push(piece) for piece in pieces if piece] + [detokenizer.finish()])


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), sizes=st.lists(st.integers(1, 4), max_size=60), skip=st.booleans())
def test_byte_level_equals_decode_of_text(tokenizer, text, sizes, skip):
    ids = tokenizer.encode(text + EXTRA, add_special_tokens=False).ids
    found = stream(DetokenizerFactory(tokenizer).create(skip_special_tokens=skip), cut(ids, sizes))
    assert found == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 2053), max_size=40), sizes=st.lists(st.integers(1, 4), max_size=40))
def test_byte_level_equals_decode_of_any_tokens(tokenizer, ids, sizes):
    # Invalid UTF-8 included: every broken sequence becomes the same replacement characters.
    found = stream(DetokenizerFactory(tokenizer).create(skip_special_tokens=True), cut(ids, sizes))
    assert found == tokenizer.decode(ids, skip_special_tokens=True)


def test_characters_leave_only_whole(tokenizer):
    ids = tokenizer.encode("日", add_special_tokens=False).ids
    assert len(ids) > 1
    detokenizer = DetokenizerFactory(tokenizer).create(skip_special_tokens=True)
    assert [detokenizer.push((token,)) for token in ids] == [""] * (len(ids) - 1) + ["日"]


def test_unknown_ids_are_nothing(tokenizer):
    detokenizer = DetokenizerFactory(tokenizer).create(skip_special_tokens=True)
    assert detokenizer.push((10**6,)) == ""
    assert detokenizer.push((*tokenizer.encode("a").ids, 10**6)) == "a"


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer as Llama 2 and Mistral have it: metaspace, bytes as fallback, first space stripped."""
    words = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "ab", "▁ab"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    found = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence(steps)
    found.add_special_tokens([AddedToken("</s>", special=True)])
    return found


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab é日🎌", max_size=20), sizes=st.lists(st.integers(1, 4), max_size=60))
def test_metaspace_equals_decode(sentencepiece, text, sizes):
    factory = DetokenizerFactory(sentencepiece)
    assert factory.table is not None
    ids = sentencepiece.encode(text).ids
    assert stream(factory.create(skip_special_tokens=True), cut(ids, sizes)) == sentencepiece.decode(ids)


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="ab cd", max_size=30))
def test_other_decoders_use_the_library(tokenizer, text):
    spec = json.loads(tokenizer.to_str())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    other = Tokenizer.from_str(json.dumps(spec))
    factory = DetokenizerFactory(other)
    assert factory.table is None
    detokenizer = factory.create(skip_special_tokens=True)
    assert isinstance(detokenizer, StreamDetokenizer)
    ids = other.encode(text, add_special_tokens=False).ids
    assert stream(detokenizer, [[token] for token in ids]) == other.decode(ids)
