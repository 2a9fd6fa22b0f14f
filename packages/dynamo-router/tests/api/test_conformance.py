from __future__ import annotations

import msgspec

from dynamo_core.component import ComponentContext
from dynamo_core.routing import Router, RouterScope
from dynamo_core.testing import RouterConformance
from dynamo_router import create_router


class TestKvRouter(RouterConformance):
    def make_router(self, context: ComponentContext, scope: RouterScope) -> Router:
        return create_router(context, scope)


class TestRoundRobinRouter(RouterConformance):
    def make_router(self, context: ComponentContext, scope: RouterScope) -> Router:
        return create_router(context, msgspec.structs.replace(scope, policy="round-robin"))


class TestLeastLoadedRouter(RouterConformance):
    def make_router(self, context: ComponentContext, scope: RouterScope) -> Router:
        return create_router(context, msgspec.structs.replace(scope, policy="least-loaded"))
