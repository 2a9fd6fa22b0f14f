"""Conformance of planners, load predictors and scaling targets."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy

import pytest

from dynamo_core.errors import InvalidRequestError, NotFoundError
from dynamo_core.ids import WorkerId
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.planning import LoadPredictor, Observation, Planner, PoolState, ScalingTarget, TrafficStats
from dynamo_core.testing._suite import ConformanceSuite
from dynamo_core.wire import SCALING_DECISION


class PlannerConformance(ConformanceSuite, suite=True):
    """Every ``Planner`` must pass this."""

    @abstractmethod
    def make_planner(self) -> Planner:
        """Return a new planner; all that this returns in one test are configured alike."""
        ...

    def roles(self) -> tuple[str, ...]:
        """Return the roles that the planner is configured for."""
        return ("worker",)

    def observation(self, step: int, *, requests: int = 100) -> Observation:
        """Return what is seen at a step of a run: steady pools and some traffic."""
        traffic = TrafficStats(
            "model",
            interval_s=30.0,
            requests=requests,
            prompt_tokens=requests * 512,
            output_tokens=requests * 128,
            ttft_s=(0.2,) * min(requests, 8),
            itl_s=(0.02,) * min(requests, 8),
            ended_at_s=1000.0 + 30 * step,
        )
        return Observation(
            at_s=1000.0 + 30 * step,
            traffic=(traffic,),
            pools={role: PoolState(ready=2, desired=2, startup_s=20.0) for role in self.roles()},
            loads={"1": ReportedLoad(kv_used_blocks=10, kv_total_blocks=100, active_requests=3)},
            passes=(ForwardPassMetrics(WorkerId(1), 0.02),),
        )

    def run_of(self, length: int) -> list[Observation]:
        """Return a run whose traffic rises and falls."""
        return [self.observation(step, requests=50 * (1 + step % 5)) for step in range(length)]

    def test_same_observations_give_same_decisions(self) -> None:
        one, two = self.make_planner(), self.make_planner()
        run = self.run_of(12)
        assert [one.decide(item) for item in run] == [two.decide(item) for item in run]

    def test_observations_are_left_alone(self) -> None:
        planner = self.make_planner()
        run = self.run_of(3)
        before = deepcopy(run)
        for item in run:
            planner.decide(item)
        assert run == before

    def test_decisions_are_numbered_and_dated(self) -> None:
        planner = self.make_planner()
        run = self.run_of(5)
        decisions = [planner.decide(item) for item in run]
        first = decisions[0].decision_id
        assert first > 0
        assert [decision.decision_id for decision in decisions] == list(range(first, first + 5))
        assert [decision.at_s for decision in decisions] == [item.at_s for item in run]

    def test_replicas_are_counts_of_known_roles(self) -> None:
        planner = self.make_planner()
        for item in self.run_of(12):
            decision = planner.decide(item)
            assert decision.replicas.keys() <= item.pools.keys()
            assert all(isinstance(count, int) and count >= 0 for count in decision.replicas.values())
            assert all(math.isfinite(value) for value in decision.values.values())
            assert decision.reason
            assert SCALING_DECISION.decode(SCALING_DECISION.encode(decision)) == decision

    def test_missing_inputs_change_nothing(self) -> None:
        planner = self.make_planner()
        pools = self.observation(0).pools
        decision = planner.decide(Observation(at_s=1000.0, pools=pools))
        assert {role: count for role, count in decision.replicas.items() if count != pools[role].desired} == {}
        assert decision.reason

    def test_stale_inputs_change_nothing(self) -> None:
        planner = self.make_planner()
        item = self.observation(0)
        stale = Observation(at_s=item.at_s, pools=item.pools, stale=("traffic", "loads", "passes"))
        decision = planner.decide(stale)
        assert all(count == item.pools[role].desired for role, count in decision.replicas.items())

    def test_no_pool_is_no_crash(self) -> None:
        decision = self.make_planner().decide(Observation(at_s=1000.0))
        assert decision.replicas == {}


class LoadPredictorConformance(ConformanceSuite, suite=True):
    """Every ``LoadPredictor`` must pass this."""

    @abstractmethod
    def make_predictor(self) -> LoadPredictor:
        """Return a new predictor."""
        ...

    def test_no_data_predicts_zero(self) -> None:
        assert self.make_predictor().predict() == 0.0

    def test_constant_load_stays(self) -> None:
        predictor = self.make_predictor()
        for _ in range(60):
            predictor.observe(40.0)
        assert predictor.predict() == pytest.approx(40.0, rel=0.05)
        assert predictor.predict(3) == pytest.approx(40.0, rel=0.1)

    def test_missing_points_are_left_out(self) -> None:
        predictor = self.make_predictor()
        for value in (math.nan, math.inf, -math.inf):
            predictor.observe(value)
        assert predictor.predict() == 0.0
        for value in (40.0, math.nan) * 30:
            predictor.observe(value)
        assert predictor.predict() == pytest.approx(40.0, rel=0.05)

    def test_forecast_is_finite_and_not_negative(self) -> None:
        predictor = self.make_predictor()
        for step in range(50):
            predictor.observe(max(0.0, 1000.0 - 25.0 * step))
            for horizon in (1, 2, 10):
                forecast = predictor.predict(horizon)
                assert math.isfinite(forecast)
                assert forecast >= 0

    def test_asking_changes_nothing(self) -> None:
        asked, silent = self.make_predictor(), self.make_predictor()
        for step in range(30):
            asked.observe(float(step % 7))
            silent.observe(float(step % 7))
            asked.predict(step % 3 + 1)
        assert asked.predict() == silent.predict()


class ScalingTargetConformance(ConformanceSuite, suite=True):
    """Every ``ScalingTarget`` must pass this."""

    @abstractmethod
    async def make_target(self, replicas: Mapping[str, int]) -> ScalingTarget:
        """Return a target, not started, with these roles and counts already asked for."""
        ...

    async def desired(self, target: ScalingTarget) -> dict[str, int]:
        """Return the wish of each pool."""
        return {role: pool.desired for role, pool in (await self.within(target.state())).items()}

    async def test_state_shows_the_pools(self) -> None:
        async with self.running(await self.make_target({"prefill": 1, "decode": 2})) as (target,):
            assert await self.desired(target) == {"prefill": 1, "decode": 2}
            for pool in (await target.state()).values():
                assert min(pool.ready, pool.starting, pool.draining, pool.failed) >= 0

    async def test_scale_changes_the_named_roles_only(self) -> None:
        async with self.running(await self.make_target({"prefill": 1, "decode": 2})) as (target,):
            await self.within(target.scale({"decode": 3}))
            assert await self.desired(target) == {"prefill": 1, "decode": 3}
            await self.within(target.scale({"decode": 1, "prefill": 0}))
            assert await self.desired(target) == {"prefill": 0, "decode": 1}

    async def test_asking_again_changes_nothing(self) -> None:
        async with self.running(await self.make_target({"worker": 1})) as (target,):
            await self.within(target.scale({"worker": 2}))
            await self.within(target.scale({"worker": 2}))
            assert await self.desired(target) == {"worker": 2}

    async def test_old_decisions_are_ignored(self) -> None:
        async with self.running(await self.make_target({"worker": 1})) as (target,):
            await self.within(target.scale({"worker": 2}, decision_id=5))
            await self.within(target.scale({"worker": 3}, decision_id=5))
            await self.within(target.scale({"worker": 3}, decision_id=4))
            assert await self.desired(target) == {"worker": 2}
            await self.within(target.scale({"worker": 1}))
            assert await self.desired(target) == {"worker": 1}
            await self.within(target.scale({"worker": 2}, decision_id=6))
            assert await self.desired(target) == {"worker": 2}

    async def test_unknown_role_is_refused_and_changes_nothing(self) -> None:
        async with self.running(await self.make_target({"worker": 1})) as (target,):
            with pytest.raises(NotFoundError):
                await self.within(target.scale({"worker": 2, "nobody": 1}))
            assert await self.desired(target) == {"worker": 1}

    async def test_negative_count_is_refused_and_changes_nothing(self) -> None:
        async with self.running(await self.make_target({"prefill": 1, "decode": 1})) as (target,):
            with pytest.raises(InvalidRequestError):
                await self.within(target.scale({"prefill": 2, "decode": -1}))
            assert await self.desired(target) == {"prefill": 1, "decode": 1}

    async def test_close_twice(self) -> None:
        async with self.running(await self.make_target({"worker": 1})) as (target,):
            await self.within(target.close())
