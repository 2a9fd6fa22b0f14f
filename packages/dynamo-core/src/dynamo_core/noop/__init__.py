"""The smallest honest version of each part: complete in its contract, trivial in what it decides.

With ``dynamo_core.memory`` they run a request through every contract in one process. They are also what a test of one
part puts in the place of all others, and the first implementations that the conformance suites are run against.
"""

from dynamo_core.noop.context import LocalRequestContext
from dynamo_core.noop.engine import EchoEngine
from dynamo_core.noop.kv import DictBlockStore, NullKvConnector
from dynamo_core.noop.planning import HoldPlanner, LastValuePredictor, StaticScalingTarget
from dynamo_core.noop.router import RoundRobinRouter, create_router

__all__ = [
    "DictBlockStore",
    "EchoEngine",
    "HoldPlanner",
    "LastValuePredictor",
    "LocalRequestContext",
    "NullKvConnector",
    "RoundRobinRouter",
    "StaticScalingTarget",
    "create_router",
]
