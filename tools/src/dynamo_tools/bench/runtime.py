"""What every token and every prompt pays, and what the planes cost: codec, hashing, request plane, discovery."""

from __future__ import annotations

import hashlib

from dynamo_core import BlockHasher, GenerateChunk, pack_tokens
from dynamo_core.wire import Codec
from dynamo_tools.bench import Options, runtime_discovery, runtime_faults, runtime_losses, runtime_plane
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.measure import cpu_us_per_call, repeat
from dynamo_tools.bench.rivals import Rival, measure

_BLOCKS = 16
_BLOCK_TOKENS = 16
_CHUNK = GenerateChunk(token_ids=pack_tokens([101_234, 7, 42_000, 9]), first_index=128, choice=0, attempt=0)
_ORJSON = Rival("orjson", ("orjson==3.10.18",))
_ORJSON_PROGRAM = """
import sys, time, orjson
calls, runs = int(sys.argv[1]), int(sys.argv[2])
chunk = {"token_ids": [101234, 7, 42000, 9], "first_index": 128, "choice": 0, "attempt": 0}
for _ in range(runs):
    started = time.process_time()
    for _ in range(calls):
        orjson.loads(orjson.dumps(chunk))
    print((time.process_time() - started) / calls * 1e6)
"""


def run(options: Options) -> list[Figure]:
    """Measure all of it."""
    return [_codec(options), _hashes(options), *_planes(options)]


def _planes(options: Options) -> list[Figure]:
    parts = (runtime_plane, runtime_discovery, runtime_faults, runtime_losses)
    return [figure for part in parts for figure in part.run(options)]


def _codec(options: Options) -> Figure:
    codec = Codec(GenerateChunk, "dynamo.generate_chunk.v1")
    calls = 20_000 if options.quick else 200_000
    values = repeat(lambda: cpu_us_per_call(lambda: codec.decode(codec.encode(_CHUNK)), calls), options.runs)
    rival = measure(_ORJSON, options.cache, _ORJSON_PROGRAM, (str(calls), str(options.runs)))
    return Figure.of("codec_chunk_roundtrip", values, unit="us CPU", better="lower", rival="orjson", rival_value=rival)


def _hashes(options: Options) -> Figure:
    """Hash a prompt of 16 blocks; the rival is a chained SHA-256, which some engines use for the same purpose."""
    tokens = pack_tokens(range(_BLOCKS * _BLOCK_TOKENS))
    hasher = BlockHasher(block_size=_BLOCK_TOKENS)
    calls = 2_000 if options.quick else 20_000
    values = repeat(lambda: cpu_us_per_call(lambda: hasher.hash_tokens(tokens), calls), options.runs)
    rivals = repeat(lambda: cpu_us_per_call(lambda: _sha256_chain(tokens), calls), options.runs)
    rival = sorted(rivals)[len(rivals) // 2]
    return Figure.of(
        "hash_16_blocks", values, unit="us CPU", better="lower", rival="hashlib sha256 chain", rival_value=rival
    )


def _sha256_chain(tokens: bytes) -> list[bytes]:
    step = _BLOCK_TOKENS * 4
    parent, chain = b"", list[bytes]()
    for start in range(0, len(tokens), step):
        parent = hashlib.sha256(parent + tokens[start : start + step]).digest()
        chain.append(parent)
    return chain
