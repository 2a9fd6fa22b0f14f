"""Process host, discovery, request plane and event bus of the Dynamo serving stack.

``Runtime`` is the library: planes by URL, endpoints by name. ``run_components`` is the process host behind the
``dynamo`` command.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_runtime._coordination import Barrier, LeaderElection
    from dynamo_runtime._host import HostedComponent, run_components
    from dynamo_runtime._runtime import Runtime
    from dynamo_runtime._settings import RuntimeSettings

__all__ = ["Barrier", "HostedComponent", "LeaderElection", "Runtime", "RuntimeSettings", "run_components"]

_HOMES = {
    "Barrier": "dynamo_runtime._coordination",
    "HostedComponent": "dynamo_runtime._host",
    "LeaderElection": "dynamo_runtime._coordination",
    "Runtime": "dynamo_runtime._runtime",
    "RuntimeSettings": "dynamo_runtime._settings",
    "run_components": "dynamo_runtime._host",
}


def __getattr__(name: str) -> Any:
    # The host pulls in half a second of logs, metrics and settings, which a user of one plane need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
