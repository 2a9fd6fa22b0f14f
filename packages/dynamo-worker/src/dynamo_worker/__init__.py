"""Engine host, engine adapters, the mock engine and a small real engine.

``create_worker`` puts an engine on the planes of a process: registration, admission, cancellation, KV events, load,
health and drain are the host's work, so that an engine is only an engine. ``MockEngine`` plays a GPU engine in time
and memory, ``ReferenceEngine`` computes real answers with NumPy.
"""

from typing import TYPE_CHECKING, Any

from dynamo_worker._mock import MockEngine, MockSettings
from dynamo_worker._plugin import create_worker
from dynamo_worker._settings import WorkerSettings
from dynamo_worker._worker import Worker

if TYPE_CHECKING:
    from dynamo_worker._reference.engine import ReferenceEngine as ReferenceEngine

__all__ = ["MockEngine", "MockSettings", "ReferenceEngine", "Worker", "WorkerSettings", "create_worker"]


def __getattr__(name: str) -> Any:
    # NumPy and the model code are loaded only by those who compute with them.
    if name == "ReferenceEngine":
        from dynamo_worker._reference.engine import ReferenceEngine

        return ReferenceEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
