"""Engine host, engine adapters, the mock engine and a small real engine.

``create_worker`` puts an engine on the planes of a process: registration, admission, cancellation, KV events, load,
health and drain are the host's work, so that an engine is only an engine. ``MockEngine`` plays a GPU engine in time
and memory, ``ReferenceEngine`` computes real answers with NumPy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_worker._mock import MockEngine as MockEngine
    from dynamo_worker._mock import MockSettings as MockSettings
    from dynamo_worker._plugin import create_worker as create_worker
    from dynamo_worker._reference.engine import ReferenceEngine as ReferenceEngine
    from dynamo_worker._settings import WorkerSettings as WorkerSettings
    from dynamo_worker._worker import Worker as Worker

__all__ = ["MockEngine", "MockSettings", "ReferenceEngine", "Worker", "WorkerSettings", "create_worker"]

_HOME = {
    "MockEngine": "_mock",
    "MockSettings": "_mock",
    "ReferenceEngine": "_reference.engine",
    "Worker": "_worker",
    "WorkerSettings": "_settings",
    "create_worker": "_plugin",
}


def __getattr__(name: str) -> Any:
    # An engine is loaded only by those who run it: NumPy, settings and metrics take longer than all the rest.
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dynamo_worker.{home}"), name)
