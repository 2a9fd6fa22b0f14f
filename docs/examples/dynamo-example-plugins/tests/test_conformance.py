"""The kit of dynamo-core certifies engine, tier, forecaster and discovery plane; the others have tests of their own."""

import random
from types import SimpleNamespace

import pytest
from dynamo_example_plugins.engine import SpellingEngine
from dynamo_example_plugins.eviction import OldestLeaf
from dynamo_example_plugins.forecaster import MedianForecaster
from dynamo_example_plugins.plane import SqliteDiscovery, sqlite_discovery
from dynamo_example_plugins.policy import FewestRequests
from dynamo_example_plugins.tier import FileTier

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_core.testing import BlockStoreConformance, DiscoveryConformance, EngineConformance, LoadPredictorConformance


class TestSpellingEngine(EngineConformance):
    factory = SpellingEngine

    def make_engine(self) -> SpellingEngine:
        return SpellingEngine()


class TestFileTier(BlockStoreConformance):
    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path_factory):
        self._folders = tmp_path_factory

    def make_store(self, capacity_blocks: int) -> FileTier:
        folder = str(self._folders.mktemp("tier"))
        return FileTier(layout=self.layout, fingerprint="m", folder=folder, capacity_blocks=capacity_blocks)


class TestMedianForecaster(LoadPredictorConformance):
    def make_predictor(self) -> MedianForecaster:
        return MedianForecaster()


class TestSqliteDiscovery(DiscoveryConformance):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path):
        self._url = f"sqlite://{tmp_path}/discovery.db"

    async def make_discovery(self) -> SqliteDiscovery:
        return sqlite_discovery(self._url, clock=SystemClock(), options={"poll_s": 0.01})


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("policies", "fewest-requests", FewestRequests),
        ("engines", "spelling", SpellingEngine),
        ("kv_eviction", "oldest", OldestLeaf),
        ("kv_tiers", "files", FileTier),
        ("load_predictors", "median", MedianForecaster),
        ("discoveries", "sqlite", sqlite_discovery),
    ],
)
def test_each_is_found_by_its_name(kind, name, expected):
    assert plugins.load(kind, name) is expected


def test_one_burst_does_not_move_the_median():
    forecaster = MedianForecaster(window=5)
    for value in (10.0, 10.0, 10.0, 9000.0, 10.0):
        forecaster.observe(value)
    assert forecaster.predict() == 10.0


def test_the_oldest_leaf_goes_first_and_a_pinned_one_stays():
    order = OldestLeaf(8)
    order.insert([(1, None), (2, 1), (3, None)])
    order.pin([2])
    assert order.evict() == 3
    assert order.evict() is None
    order.unpin([2])
    assert [order.evict(), order.evict(), order.evict()] == [2, 1, None]
    order.check_integrity()
    with pytest.raises(InternalError, match="no pin"):
        order.unpin([2])


def candidate(worker, requests, cached):
    return SimpleNamespace(worker=worker, active_requests=requests, cached_tokens=cached)


def test_the_policy_weighs_requests_against_cached_tokens():
    policy = FewestRequests({"cached_tokens_per_request": 100})
    workers = [candidate("a", 1, 0), candidate("b", 3, 300), candidate("c", 2, 0)]
    costs = policy.score(None, workers)
    assert costs == [1.0, 0.0, 2.0]
    assert policy.pick(costs, workers, random.Random(0)) == 1


def test_equal_workers_take_turns():
    policy = FewestRequests({})
    workers = [candidate("a", 0, 0), candidate("b", 0, 0)]
    picked = []
    for _ in range(4):
        index = policy.pick(policy.score(None, workers), workers, random.Random(0))
        policy.chosen(None, workers[index])
        picked.append(workers[index].worker)
    assert picked == ["a", "b", "a", "b"]


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="colour"):
        FewestRequests({"colour": "blue"})
