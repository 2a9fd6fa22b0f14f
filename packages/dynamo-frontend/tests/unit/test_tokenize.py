"""Tokenising in cached pieces equals tokenising at once, within the cache's bound."""

import asyncio
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from dynamo_core.errors import ConfigurationError
from dynamo_core.tokens import unpack_tokens
from dynamo_frontend._tokenize import TextTokenizer, TokenCache, load_tokenizer

PIECES = ["<|im_start|>", "<|im_end|>", "<tool_call>", "user\n", "Hello wörld", "\n", " ", "日本", "<|", "12"]


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES), max_size=12))
async def test_pieces_equal_the_whole(tokenizer, parts):
    cache = TokenCache(1 << 20)
    text = "".join(parts)
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    model = TextTokenizer(tokenizer, cache, inline_chars=1000)
    for _ in range(2):
        assert list(unpack_tokens(await model.encode(text, add_special_tokens=False))) == expected
    assert list(unpack_tokens(await model.encode(text, add_special_tokens=True))) == tokenizer.encode(text).ids


async def test_earlier_turns_are_found_again(tokenizer):
    cache = TokenCache(1 << 20)
    model = TextTokenizer(tokenizer, cache, inline_chars=1000)
    turns = [f"<|im_start|>user\nturn {index}<|im_end|>\n" for index in range(5)]
    for count in range(1, 6):
        await model.encode("".join(turns[:count]), add_special_tokens=False)
    assert cache.misses == 5 + 1
    model.close()
    assert cache.size_bytes == 0


async def test_cache_stays_within_its_bound(tokenizer):
    sizes = []
    cache = TokenCache(8000, sizes.append)
    model = TextTokenizer(tokenizer, cache, inline_chars=1000)
    for index in range(200):
        await model.encode(f"text number {index}", add_special_tokens=False)
    assert max(sizes) <= 8000
    assert cache.size_bytes == sizes[-1] > 4000


async def test_tokens_added_by_the_tokenizer_do_not_mix_with_plain_ones(tokenizer):
    own = Tokenizer.from_str(tokenizer.to_str())
    own.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    model = TextTokenizer(own, TokenCache(1 << 20), inline_chars=1000)
    for _ in range(2):
        assert list(unpack_tokens(await model.encode("Hi", add_special_tokens=True))) == own.encode("Hi").ids
        plain = list(unpack_tokens(await model.encode("Hi", add_special_tokens=False)))
        assert plain == own.encode("Hi", add_special_tokens=False).ids


async def test_text_is_not_cut_where_that_could_change_ids(tokenizer):
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    other = Tokenizer.from_str(json.dumps(spec))
    cache = TokenCache(1 << 20)
    model = TextTokenizer(other, cache, inline_chars=1000)
    text = "a<|im_start|>b<|im_end|>c"
    assert list(unpack_tokens(await model.encode(text, add_special_tokens=False))) == other.encode(text).ids
    assert cache.misses == 1


async def test_long_text_is_tokenised_on_another_thread(tokenizer):
    threads = []

    class Spy(TextTokenizer):
        def _encode_all(self, texts, add_special_tokens):
            threads.append(threading.get_ident())
            return super()._encode_all(texts, add_special_tokens)

    model = Spy(tokenizer, TokenCache(1 << 20), inline_chars=50)
    await model.encode("short", add_special_tokens=False)
    await model.encode("long " * 100, add_special_tokens=False)
    assert threads[0] == threading.get_ident() != threads[1]


async def test_event_loop_goes_on_while_a_long_text_is_tokenised(tokenizer):
    model = TextTokenizer(tokenizer, TokenCache(0), inline_chars=50)
    work = asyncio.create_task(model.encode(" ".join(map(str, range(100_000))), add_special_tokens=False))
    began = last = time.perf_counter()
    longest = 0.0
    while not work.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    # Were the interpreter's lock held, one gap would be nearly the whole.
    assert longest < 0.7 * (last - began)


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        load_tokenizer(path)
