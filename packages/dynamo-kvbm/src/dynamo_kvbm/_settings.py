"""Options of the block manager."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, ValidationError, model_validator

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings


class OffloadPolicy(enum.Enum):
    """When a device block is copied to the host tier."""

    REGISTER = "register"
    EVICT = "evict"


class KvbmSettings(DynamoSettings):
    """Block manager: tiers beyond device memory and when blocks move there."""

    component: ClassVar[str] = "kvbm"

    host_blocks: int = Field(0, ge=0, description="Blocks of the host tier; wins over host_bytes.")
    host_bytes: int = Field(256 * 1024**2, ge=0, description="Memory of the host tier, used if host_blocks is 0.")
    offload: OffloadPolicy = Field(
        OffloadPolicy.EVICT,
        description="Copy a block to the host when it is complete (register) or when the device reuses it (evict).",
    )
    eviction: str = Field("lru", description="Eviction order of the tiers: lru, arc, s3fifo or an installed plug-in.")

    @model_validator(mode="after")
    def _has_room(self) -> KvbmSettings:
        if not self.host_blocks and not self.host_bytes:
            raise ValueError("host_blocks and host_bytes are both 0; give one of them, or leave the connector out")
        return self

    def host_capacity_blocks(self, block_bytes: int) -> int:
        """Blocks of the host tier for blocks of this size.

        Raises:
            ConfigurationError: if host_bytes is less than one block.
        """
        blocks = self.host_blocks or self.host_bytes // block_bytes
        if not blocks:
            raise ConfigurationError(
                f"host_bytes {self.host_bytes} holds no block of {block_bytes} bytes; give at least {block_bytes}"
            )
        return blocks


def settings_from_options(options: Mapping[str, object]) -> KvbmSettings:
    """Read connector options.

    Raises:
        ConfigurationError: for an unknown option or a bad value, naming both.
    """
    try:
        return KvbmSettings.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(sorted(KvbmSettings.model_fields))
        message = first["msg"].removeprefix("Value error, ")
        detail = f"option {name!r} has the value {first['input']!r}: " if name else ""
        raise ConfigurationError(f"kvbm connector {detail}{message}; options are {known}") from error
