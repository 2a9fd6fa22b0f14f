"""The mock engine: scheduler, prefix cache and timing of a GPU engine, without the arithmetic."""

from dynamo_worker._mock._engine import MockEngine
from dynamo_worker._mock._settings import MockSettings

__all__ = ["MockEngine", "MockSettings"]
