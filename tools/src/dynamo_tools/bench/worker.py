"""The engine host and the engines: decode rates, prefix hits, cost of the host, abort, KV transfer."""

from __future__ import annotations

import asyncio

from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.worker_engine import engine_figures
from dynamo_tools.bench.worker_host import host_figures
from dynamo_tools.bench.worker_transfer import transfer_figures


def run(options: Options) -> list[Figure]:
    """Measure everything, one part after the other."""
    return [
        *asyncio.run(engine_figures(options)),
        *asyncio.run(host_figures(options)),
        *asyncio.run(transfer_figures(options)),
    ]
