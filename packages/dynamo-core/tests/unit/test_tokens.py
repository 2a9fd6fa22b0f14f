"""Packing, and the golden vectors of the block-hash algorithm."""

from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import InvalidRequestError
from dynamo_core.tokens import (
    XXH3_1337_V1,
    BlockHasher,
    chain_hashes,
    pack_hashes,
    pack_tokens,
    require_algorithm,
    token_count,
    unpack_hashes,
    unpack_tokens,
)

FOUR_LOCAL = [14643705804678351452, 16777012769546811212, 483935686894639516]
FOUR_SEQUENCE = [14643705804678351452, 4945711292740353085, 12583592247330656132]
SIXTEEN_LOCAL = [16863443419780771464, 2287610619914608821, 12129935312930971799]
SIXTEEN_SEQUENCE = [16863443419780771464, 12466389667045779788, 960926348267535642]


def test_vectors_of_block_size_4() -> None:
    hashes = BlockHasher(4).hash_tokens(pack_tokens(range(1, 13)))
    assert list(unpack_hashes(hashes.local)) == FOUR_LOCAL
    assert list(unpack_hashes(hashes.sequence)) == FOUR_SEQUENCE
    assert len(hashes) == 3


def test_vectors_of_block_size_16() -> None:
    hashes = BlockHasher(16).hash_tokens(pack_tokens(range(1, 49)))
    assert list(unpack_hashes(hashes.local)) == SIXTEEN_LOCAL
    assert list(unpack_hashes(hashes.sequence)) == SIXTEEN_SEQUENCE


def test_vectors_with_a_lora() -> None:
    hasher = BlockHasher(16, lora="lora-a")
    assert hasher.seed == 16914862882262291013
    assert list(unpack_hashes(hasher.hash_tokens(pack_tokens(range(1, 49))).local)) == [
        505115133176759089,
        3289525268460731972,
        12345990564547099292,
    ]


def test_vectors_with_a_salt() -> None:
    hasher = BlockHasher(16, salt="tenant-a")
    assert hasher.seed == 1948188790972764086
    assert list(unpack_hashes(hasher.hash_tokens(pack_tokens(range(1, 17))).local)) == [8175209796170318505]


def test_vector_with_a_multimodal_hash() -> None:
    hashes = BlockHasher(16).hash_tokens(pack_tokens(range(1, 49)), mm_hashes=[[0xDEADBEEF]])
    assert list(unpack_hashes(hashes.local)) == [14529151895984176542, *SIXTEEN_LOCAL[1:]]


def test_chain_with_another_seed_would_differ() -> None:
    # The transitional revision chained under seed 0; this release must never produce or accept it by accident.
    seed_0 = [14643705804678351452, 13257339816715102022, 18362646011897812054]
    found = [FOUR_LOCAL[0]]
    for local in FOUR_LOCAL[1:]:
        data = found[-1].to_bytes(8, "little") + local.to_bytes(8, "little")
        found.append(xxhash.xxh3_64_intdigest(data, 0))
    assert found == seed_0
    assert chain_hashes(FOUR_LOCAL) == FOUR_SEQUENCE != seed_0


def test_lora_and_salt_add_up_and_wrap() -> None:
    both = BlockHasher(16, lora="lora-a", salt="tenant-a").seed
    assert both == (16914862882262291013 + 1948188790972764086 - 1337) % (1 << 64)


def test_multimodal_hashes_of_a_block_are_sorted() -> None:
    tokens = pack_tokens(range(16))
    one = BlockHasher(16).hash_tokens(tokens, mm_hashes=[[3, 1, 2]])
    two = BlockHasher(16).hash_tokens(tokens, mm_hashes=[[1, 2, 3]])
    assert one == two


def test_partial_blocks_are_not_hashed() -> None:
    assert len(BlockHasher(4).hash_tokens(pack_tokens(range(3)))) == 0
    assert len(BlockHasher(4).hash_tokens(pack_tokens(range(7)))) == 1


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=40), st.integers(1, 8), st.integers(0, 5))
def test_hashing_a_tail_equals_hashing_the_whole(tokens: list[int], block_size: int, start: int) -> None:
    packed = pack_tokens(tokens)
    hasher = BlockHasher(block_size)
    whole = hasher.hash_tokens(packed)
    start = min(start, len(whole))
    parent = unpack_hashes(whole.sequence)[start - 1] if start else None
    tail = hasher.hash_tokens(packed, start_block=start, parent=parent)
    assert tail.local == whole.local[start * 8 :]
    assert tail.sequence == whole.sequence[start * 8 :]


@given(st.lists(st.lists(st.integers(0, (1 << 64) - 1), max_size=3), max_size=4))
def test_a_tail_with_multimodal_hashes_equals_the_whole(mm_hashes: list[list[int]]) -> None:
    packed = pack_tokens(range(16))
    hasher = BlockHasher(4)
    whole = hasher.hash_tokens(packed, mm_hashes=mm_hashes)
    parent = unpack_hashes(whole.sequence)[1]
    tail = hasher.hash_tokens(packed, start_block=2, parent=parent, mm_hashes=mm_hashes)
    assert tail.sequence == whole.sequence[16:]


@given(st.lists(st.integers(0, (1 << 32) - 1)))
def test_tokens_round_trip(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    assert list(unpack_tokens(packed)) == tokens
    assert token_count(packed) == len(tokens)
    assert packed == b"".join(token.to_bytes(4, "little") for token in tokens)


@given(st.lists(st.integers(0, (1 << 64) - 1)))
def test_hashes_round_trip(hashes: list[int]) -> None:
    packed = pack_hashes(hashes)
    assert list(unpack_hashes(packed)) == hashes
    assert packed == b"".join(value.to_bytes(8, "little") for value in hashes)


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=2, max_size=6))
def test_chain_depends_on_everything_before(local: list[int]) -> None:
    sequence = chain_hashes(local)
    for (_, after), position in zip(pairwise(sequence), range(1, len(local)), strict=True):
        assert after == chain_hashes(local[position:], sequence[position - 1])[0]


@pytest.mark.parametrize("tokens", [[-1], [1 << 32], ["a"], [1.5]])
def test_bad_tokens_are_refused(tokens: list[int]) -> None:
    with pytest.raises(InvalidRequestError, match="token id"):
        pack_tokens(tokens)


@pytest.mark.parametrize("hashes", [[-1], [1 << 64]])
def test_bad_hashes_are_refused(hashes: list[int]) -> None:
    with pytest.raises(InvalidRequestError, match="block hash"):
        pack_hashes(hashes)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_broken_lengths_are_refused(size: int) -> None:
    for read in (unpack_tokens, unpack_hashes, BlockHasher(4).hash_tokens):
        with pytest.raises(InvalidRequestError, match=f"{size} bytes"):
            read(bytes(size))


def test_later_block_needs_its_parent() -> None:
    with pytest.raises(InvalidRequestError, match="parent"):
        BlockHasher(4).hash_tokens(pack_tokens(range(8)), start_block=1)


@pytest.mark.parametrize("block_size", [0, -4])
def test_block_size_is_positive(block_size: int) -> None:
    with pytest.raises(InvalidRequestError, match="block_size"):
        BlockHasher(block_size)


def test_other_algorithms_are_refused_with_both_names() -> None:
    with pytest.raises(InvalidRequestError, match=r"'sha256-v9'.*'xxh3-1337-v1'") as caught:
        require_algorithm("sha256-v9")
    assert caught.value.reason == "request.hash_algorithm_mismatch"
    with pytest.raises(InvalidRequestError):
        BlockHasher(4, algorithm="sha256-v9")
    require_algorithm(XXH3_1337_V1)


def test_unpacking_copies_nothing() -> None:
    assert isinstance(unpack_tokens(pack_tokens((1, 2))), memoryview)
