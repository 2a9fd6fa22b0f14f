"""The operation API: look at the planner, change its limits, pause it, overrule it. Loopback only by default."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import structlog
from aiohttp import web

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError, DynamoError, InvalidRequestError
from dynamo_planner._budget import Budget, RoleLimits
from dynamo_planner._loop import PlannerLoop
from dynamo_planner._metrics import PlannerMetrics

MAX_BODY_BYTES = 64 * 1024
MAX_SHOWN = 1000
MAX_COUNT = 1_000_000
MAX_OVERRIDE_S = 7 * 86400.0
_FLEET_FIELDS = ("max_gpus", "min_gpus")
_ROLE_FIELDS = ("min_replicas", "max_replicas")

_log = structlog.get_logger(__name__)


class OperationApi:
    """Serves the API over HTTP with JSON bodies.

    ``GET /v1/status``, ``GET /v1/decisions?limit=``, ``GET`` and ``PATCH /v1/config``, ``GET`` and ``PATCH
    /v1/min-endpoints``, ``POST /v1/pause``, ``POST /v1/resume``, ``POST /v1/override`` and ``DELETE
    /v1/override/{role}``. A patch holds as a whole or not at all: 400 if it is malformed, unknown or empty, 422 if its
    values contradict the limits. Changes last as long as the process.

    Args:
        loop: The loop that is operated.
        metrics: Instruments.
        clock: Time.
        host: Address to listen on.
        port: Port; 0 takes a free one.
    """

    def __init__(self, loop: PlannerLoop, metrics: PlannerMetrics, clock: Clock, *, host: str, port: int) -> None:
        self._loop = loop
        self._metrics = metrics
        self._clock = clock
        self._host = host
        self._asked_port = port
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigurationError: if the address cannot be bound.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_json])
        app.add_routes(
            [
                web.get("/v1/status", self._status),
                web.get("/v1/decisions", self._decisions),
                web.get("/v1/config", self._config),
                web.patch("/v1/config", self._patch_config),
                web.get("/v1/min-endpoints", self._minima),
                web.patch("/v1/min-endpoints", self._patch_minima),
                web.post("/v1/pause", self._pause),
                web.post("/v1/resume", self._resume),
                web.post("/v1/override", self._override),
                web.delete("/v1/override/{role}", self._release),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._asked_port)
        try:
            await site.start()
        except OSError as error:
            await self.close()
            raise ConfigurationError(
                f"operation API cannot listen on {self._host}:{self._asked_port}: {error.strerror}; "
                "choose another --api-port"
            ) from error
        self.port = cast("tuple[str, int]", self._runner.addresses[0])[1]

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _status(self, request: web.Request) -> web.Response:
        decisions = self._loop.decisions
        health = self._loop.health()
        return web.json_response(
            {
                "state": health.state.value,
                "detail": health.reason,
                "leading": self._loop.leading,
                "paused": self._loop.paused,
                "overrides": self._loop.planner.overrides(self._clock.time()),
                "decision": msgspec.to_builtins(decisions[-1]) if decisions else None,
            }
        )

    async def _decisions(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", "100")
        if not text.isdecimal() or not 1 <= int(text) <= MAX_SHOWN:
            raise InvalidRequestError(f"limit {text!r} is not between 1 and {MAX_SHOWN}", param="limit")
        shown = list(self._loop.decisions)[-int(text) :]
        return web.json_response({"decisions": [msgspec.to_builtins(decision) for decision in shown]})

    async def _config(self, request: web.Request) -> web.Response:
        return web.json_response(_shown(self._loop.planner.budget))

    async def _patch_config(self, request: web.Request) -> web.Response:
        patch = await _body(request)
        self._replace(_patched(self._loop.planner.budget, patch))
        return web.json_response(_shown(self._loop.planner.budget))

    async def _minima(self, request: web.Request) -> web.Response:
        return web.json_response({limit.role: limit.min_replicas for limit in self._loop.planner.budget.roles})

    async def _patch_minima(self, request: web.Request) -> web.Response:
        patch = await _body(request)
        roles = {role: {"min_replicas": count} for role, count in patch.items()}
        self._replace(_patched(self._loop.planner.budget, {"roles": roles}))
        return await self._minima(request)

    async def _pause(self, request: web.Request) -> web.Response:
        return self._set_paused(True)

    async def _resume(self, request: web.Request) -> web.Response:
        return self._set_paused(False)

    async def _override(self, request: web.Request) -> web.Response:
        body = await _body(request)
        unknown = sorted(set(body) - {"role", "replicas", "for_s"})
        role, replicas, for_s = body.get("role"), body.get("replicas"), body.get("for_s")
        if unknown or not isinstance(role, str) or not _is_count(replicas):
            raise InvalidRequestError("an override needs role, replicas (at least 0) and for_s, and nothing else")
        if (
            not isinstance(for_s, int | float)
            or isinstance(for_s, bool)
            or not math.isfinite(for_s)
            or not 0 < for_s <= MAX_OVERRIDE_S
        ):
            raise InvalidRequestError(f"for_s {for_s!r} is not between 0 and {MAX_OVERRIDE_S:g} seconds", param="for_s")
        self._loop.planner.override(role, replicas, self._clock.time() + for_s)
        _log.info("operator overrides", role=role, replicas=replicas, for_s=for_s)
        return web.json_response(self._loop.planner.overrides(self._clock.time()))

    async def _release(self, request: web.Request) -> web.Response:
        self._loop.planner.override(request.match_info["role"], None, 0.0)
        return web.json_response(self._loop.planner.overrides(self._clock.time()))

    def _set_paused(self, paused: bool) -> web.Response:
        self._loop.paused = paused
        self._metrics.paused.set(paused)
        _log.info("operator pauses" if paused else "operator resumes")
        return web.json_response({"paused": paused})

    def _replace(self, budget: Budget) -> None:
        self._loop.planner.budget = budget
        _log.info("operator changes the limits", **_shown(budget))


def _shown(budget: Budget) -> dict[str, Any]:
    roles = {
        limit.role: {"gpus": limit.gpus, "min_replicas": limit.min_replicas, "max_replicas": limit.max_replicas}
        for limit in budget.roles
    }
    return {"max_gpus": budget.max_gpus, "min_gpus": budget.min_gpus, "roles": roles}


def _patched(budget: Budget, patch: dict[str, Any]) -> Budget:
    """Return the limits with the patch applied.

    Raises:
        InvalidRequestError: for an unknown name, a value that is no count, or an empty patch.
        ConfigurationError: if the limits would contradict each other.
    """
    roles = patch.get("roles", {})
    known = {limit.role for limit in budget.roles}
    unknown = sorted(set(patch) - {*_FLEET_FIELDS, "roles"})
    if unknown or not isinstance(roles, dict) or not patch or patch == {"roles": {}}:
        raise InvalidRequestError(f"a patch gives max_gpus, min_gpus or roles; this one has {unknown or 'nothing'}")
    for role, fields in cast("dict[str, Any]", roles).items():
        named = set(cast("dict[str, Any]", fields)) if isinstance(fields, dict) else set[str]()
        if role not in known or not named or named - set(_ROLE_FIELDS):
            raise InvalidRequestError(f"role {role!r} takes min_replicas and max_replicas; roles are {sorted(known)}")
    counts = [patch[name] for name in _FLEET_FIELDS if name in patch]
    counts += [value for fields in roles.values() for value in fields.values()]
    if not all(_is_count(value) for value in counts):
        raise InvalidRequestError(f"limits are whole numbers from 0 to {MAX_COUNT}")
    limits = tuple(
        RoleLimits(
            limit.role,
            limit.gpus,
            roles.get(limit.role, {}).get("min_replicas", limit.min_replicas),
            roles.get(limit.role, {}).get("max_replicas", limit.max_replicas),
        )
        for limit in budget.roles
    )
    return Budget(limits, patch.get("max_gpus", budget.max_gpus), patch.get("min_gpus", budget.min_gpus))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await request.read(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(f"the body is no JSON object: {error}") from error


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except DynamoError as error:
        status = 422 if isinstance(error, ConfigurationError) else error.http_status
        return _failure(status, error.reason, error.message)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.path} takes {allowed}, not {request.method}"
        return _failure(405, "method_not_allowed", message, {"Allow": allowed})
    except web.HTTPNotFound:
        return _failure(404, "not_found", f"there is no {request.path}; begin at /v1/status")
    except web.HTTPRequestEntityTooLarge:
        return _failure(413, "too_large", f"the body has more than {MAX_BODY_BYTES} bytes")


def _failure(status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"reason": reason, "message": message}}, status=status, headers=headers)
