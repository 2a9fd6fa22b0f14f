"""The suite that ``engine_plugin`` runs on the engine of the command line."""

from __future__ import annotations

from dynamo_core.engine import Engine
from dynamo_core.testing._engine import EngineConformance
from dynamo_core.testing.engine_plugin import chosen_engine


class TestEngine(EngineConformance):
    """The engine that ``--engine`` names."""

    def make_engine(self) -> Engine:
        """Return a new engine with the flags of ``--engine-args``."""
        factory, flags = chosen_engine()
        return factory.from_args(flags)
