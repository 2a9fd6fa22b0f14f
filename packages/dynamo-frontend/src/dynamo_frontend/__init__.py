"""OpenAI-compatible HTTP frontend: turns text into token requests, routes them, and turns token streams into replies.

The frontend finds models through discovery and workers through a router plug-in. Its own HTTP server writes what became
ready in a tick at once; a reply survives the loss of the worker that makes it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_frontend._component import Frontend as Frontend
    from dynamo_frontend._component import FrontendPlugin as FrontendPlugin
    from dynamo_frontend._settings import FrontendSettings as FrontendSettings

__all__ = ["Frontend", "FrontendPlugin", "FrontendSettings"]

_HOME = {"Frontend": "_component", "FrontendPlugin": "_component", "FrontendSettings": "_settings"}


def __getattr__(name: str) -> Any:
    # Settings and metrics import pydantic and prometheus-client; a parser plug-in need not wait for them.
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dynamo_frontend.{home}"), name)
