"""GPU types from the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_planner._settings import PlannerSettings

MOST_TYPES = 6


class GpuTypeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``--gpu-types`` says of one. What is left out is as the settings have it for every engine.

    Attributes:
        price_per_hour: Price of one replica, in any currency.
        serves: ``worker``, ``prefill`` or ``decode``; what the mode plans if it is one thing.
        gpus: GPUs of one replica.
        min_replicas: Fewest; the first type of what is served keeps the common minimum, the others none.
        max_replicas: Most.
        requests_per_replica_s: With capacity ``rate``.
        speedup: With capacity ``analytic``.
        kv_tokens: KV tokens of one engine.
        max_num_seqs: Requests that one engine runs at once.
        max_batched_tokens: With capacity ``analytic``: prompt tokens of one step.
        profile_dir: With capacity ``profile``.
    """

    price_per_hour: float
    serves: str = ""
    gpus: int = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    requests_per_replica_s: float | None = None
    speedup: float | None = None
    kv_tokens: float | None = None
    max_num_seqs: int | None = None
    max_batched_tokens: int | None = None
    profile_dir: Path | None = None


@dataclass(frozen=True)
class TypeSettings:
    """One type, complete.

    Attributes:
        role: Role of its replicas.
        serves: ``worker``, ``prefill`` or ``decode``.
        price_per_hour: Price of one replica.
        gpus: GPUs of one replica.
        least: Fewest replicas.
        most: Most replicas.
        engine: The settings with this type's engine in place of the common one.
    """

    role: str
    serves: str
    price_per_hour: float
    gpus: int
    least: int
    most: int
    engine: PlannerSettings


def gpu_types(settings: PlannerSettings) -> tuple[TypeSettings, ...]:
    """Return the types of the settings, in order; none if all engines are alike.

    Raises:
        ConfigurationError: if one is wrong, or they do not go with the other settings.
    """
    if not settings.gpu_types:
        return ()
    _fitting(settings)
    found: list[TypeSettings] = []
    for role, given in settings.gpu_types.items():
        options = _converted(role, given)
        serves = _serves(settings, role, options)
        first = all(kind.serves != serves for kind in found)
        found.append(_complete(settings, (role, serves), options, first=first))
    missing = _SERVED[settings.mode] - {kind.serves for kind in found}
    if missing:
        raise ConfigurationError(f"no GPU type serves {sorted(missing)} in mode {settings.mode!r}; add one")
    return tuple(found)


_SERVED = {
    "agg": frozenset({"worker"}),
    "prefill": frozenset({"prefill"}),
    "decode": frozenset({"decode"}),
    "disagg": frozenset({"prefill", "decode"}),
}


def _fitting(settings: PlannerSettings) -> None:
    if len(settings.gpu_types) > MOST_TYPES:
        raise ConfigurationError(f"{len(settings.gpu_types)} GPU types given; give at most {MOST_TYPES}")
    by_forecast = settings.optimization_target == "sla" and settings.enable_throughput_scaling
    if not by_forecast or settings.enable_load_scaling:
        raise ConfigurationError("GPU types are chosen from the forecast load; use them without load scaling")
    if settings.mode == "disagg" and settings.max_price_per_hour is not None:
        raise ConfigurationError("--max-price-per-hour is for one thing that is served; limit mode 'disagg' by GPUs")
    if settings.capacity == "learned":
        raise ConfigurationError("GPU types need a capacity known beforehand; use rate, analytic or profile")


def _converted(role: str, given: object) -> GpuTypeOptions:
    try:
        options = msgspec.convert(given, GpuTypeOptions)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"GPU type {role!r} is wrong: {error}") from error
    if not (0 < options.price_per_hour < float("inf")):
        raise ConfigurationError(f"GPU type {role!r} has price_per_hour {options.price_per_hour}; give one above 0")
    return options


def _serves(settings: PlannerSettings, role: str, options: GpuTypeOptions) -> str:
    served = _SERVED[settings.mode]
    serves = options.serves or (next(iter(served)) if len(served) == 1 else "")
    if serves not in served:
        raise ConfigurationError(f"GPU type {role!r} serves {serves!r}; mode {settings.mode!r} has {sorted(served)}")
    return serves


def _complete(
    settings: PlannerSettings, names: tuple[str, str], options: GpuTypeOptions, *, first: bool
) -> TypeSettings:
    role, serves = names
    common = {"prefill": settings.prefill_min_replicas, "decode": settings.decode_min_replicas}.get(serves)
    least = settings.min_replicas if common is None else common
    changed = {
        "requests_per_replica_s": options.requests_per_replica_s,
        "engine_speedup": options.speedup,
        "engine_kv_tokens": options.kv_tokens,
        "engine_max_num_seqs": options.max_num_seqs,
        "engine_max_batched_tokens": options.max_batched_tokens,
        "profile_dir": options.profile_dir,
    }
    for name, value in changed.items():
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise ConfigurationError(f"GPU type {role!r} has {name} {value}; give one above 0")
    known = {name: value for name, value in changed.items() if value is not None}
    return TypeSettings(
        role=role,
        serves=serves,
        price_per_hour=options.price_per_hour,
        gpus=options.gpus,
        least=(least if first else 0) if options.min_replicas is None else options.min_replicas,
        most=settings.max_replicas if options.max_replicas is None else options.max_replicas,
        engine=settings.model_copy(update=known),
    )
