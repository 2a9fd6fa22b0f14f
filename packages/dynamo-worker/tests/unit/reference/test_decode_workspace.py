"""The dense copies of decoding sequences hold what the blocks hold, within their bound, whoever comes and goes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import CoreRun, answer, build_core, generate_request

from dynamo_core.kv import BlockLayout
from dynamo_worker._reference._decode_workspace import DecodeRow, DecodeWorkspace
from dynamo_worker._reference._kv_cache import KVCache

LAYOUT = BlockLayout(2, 4, 2, 8, "f32")
NUM_BLOCKS = 128


class Sequences:
    """Sequences that decode over a cache of random content, each with a block table of its own."""

    def __init__(self, max_tokens: int) -> None:
        self.cache = KVCache(LAYOUT, NUM_BLOCKS)
        self.cache.data[...] = np.random.default_rng(0).standard_normal(self.cache.data.shape)
        self.workspace = DecodeWorkspace(LAYOUT, max_tokens)
        self.owners = [object() for _ in range(6)]
        self.max_tokens = max_tokens

    def table(self, index: int) -> list[int]:
        return [(index * 37 + block * 11) % NUM_BLOCKS for block in range(64)]

    def step(self, positions: dict[int, int]) -> list[int]:
        """Decode one token of each, check every slot that was laid out, and return who found no room."""
        rows = [
            DecodeRow(self.owners[index], row, position, self.table(index))
            for row, (index, position) in enumerate(positions.items())
        ]
        batches, left = self.workspace.arrange(rows, self.cache.data)
        assert self.workspace.num_tokens <= self.max_tokens
        indices = list(positions)
        laid: list[int] = []
        for batch in batches:
            who = [indices[row] for row in batch.rows]
            laid += who
            for layer in range(LAYOUT.num_layers):
                batch.append(layer, np.stack([self.content(index, positions[index])[layer] for index in who]))
                self._check(batch.layer(layer), layer, [(index, positions[index] + 1) for index in who])
        missing = [indices[row.row] for row in left]
        assert sorted([*laid, *missing]) == sorted(indices)
        return missing

    def content(self, index: int, position: int) -> Any:
        block = self.table(index)[position // LAYOUT.block_size]
        return self.cache.data[:, block, position % LAYOUT.block_size]

    def _check(self, laid: Any, layer: int, ends: list[tuple[int, int]]) -> None:
        keys, values = laid
        for slot, (index, end) in enumerate(ends):
            expected = np.stack([self.content(index, position)[layer] for position in range(end)])
            assert np.array_equal(keys[slot, :, :, :end].transpose(2, 0, 1), expected[:, :, 0])
            assert np.array_equal(values[slot, :, :end].swapaxes(0, 1), expected[:, :, 1])
            assert np.isfinite(values[slot]).all()


@settings(max_examples=60, deadline=None)
@given(
    max_tokens=st.sampled_from([0, 128, 300, 1000, 5000]),
    steps=st.lists(st.dictionaries(st.integers(0, 5), st.sampled_from([0, 1, 2, 3]), max_size=6), max_size=25),
    starts=st.lists(st.integers(0, 220), min_size=6, max_size=6),
)
def test_slots_hold_what_blocks_hold(max_tokens: int, steps: list[dict[int, int]], starts: list[int]) -> None:
    sequences = Sequences(max_tokens)
    positions = list(starts)
    for step in steps:
        sequences.step({index: positions[index] for index in step})
        for index, kind in step.items():  # mostly the next token; at times the same again, or a restart
            positions[index] = min(positions[index] + 1, 255) if kind else starts[index]


def test_a_sequence_that_goes_on_is_not_copied_again() -> None:
    sequences = Sequences(1000)
    sequences.step({0: 5, 1: 9})
    sequences.cache.data[:] = np.nan
    rows = [DecodeRow(sequences.owners[index], index, position, []) for index, position in ((0, 6), (1, 10))]
    (batch,), _ = sequences.workspace.arrange(rows, sequences.cache.data)
    keys, values = batch.layer(1)
    assert np.isfinite(keys[0, :, :, :6]).all()
    assert np.isfinite(values[1, :, :10]).all()


def test_room_goes_to_others_once_a_sequence_is_gone() -> None:
    sequences = Sequences(256)
    assert sequences.step({0: 5, 1: 9, 2: 7}) == [2]
    assert sequences.step({2: 8, 1: 10, 0: 6}) == [2], "those that are laid out stay"
    assert sequences.step({1: 11, 2: 9}) == []
    assert sequences.step({1: 12, 2: 10, 3: 200}) == [3]
    assert sequences.step({3: 201}) == []


def test_what_another_sequence_left_behind_a_position_cannot_spoil_it() -> None:
    sequences = Sequences(128)
    sequences.cache.data[:, sequences.table(0)[:20]] = np.nan
    rows = [DecodeRow(sequences.owners[0], 0, 79, sequences.table(0))]
    sequences.workspace.arrange(rows, sequences.cache.data)
    sequences.cache.data[...] = 1.0
    assert sequences.step({1: 3}) == []


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_tokens_do_not_depend_on_the_room(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(range(3 + number, 40 + 9 * number)) for number in range(5)]

    def tokens(max_tokens: int | None) -> list[list[int]]:
        core = build_core(kv_cache_dtype=dtype)
        if max_tokens is not None:
            monkeypatch.setattr(core.cache, "workspace", DecodeWorkspace(core.cache.layout, max_tokens))
        run = CoreRun(core)
        found = [run.submit(generate_request(prompt, request_id=f"{prompt[0]}")) for prompt in prompts]
        run.finish()
        return [item.tokens[0] for item in found]

    assert tokens(None) == tokens(0) == tokens(256)


def test_sleep_gives_the_memory_back() -> None:
    core = build_core()
    answer(core, generate_request([5, 6, 7]))
    assert core.cache.workspace.num_tokens > 0
    core.sleep(drop_weights=False)
    assert core.cache.workspace.num_tokens == 0
