"""Options of the block manager."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings
from dynamo_kvbm._codecs import CodecName


class OffloadPolicy(enum.Enum):
    """When a block is copied to the tier below: as soon as it is there, once it was used twice, or when it goes.

    What was used twice goes down when it is complete a second time (device) or evicted (other tiers).
    """

    REGISTER = "register"
    SECOND_TOUCH = "second-touch"
    EVICT = "evict"


class Admission(enum.Enum):
    """Which blocks that tiers hold are offered to the engine."""

    ALWAYS = "always"
    COST = "cost"


class KvbmSettings(DynamoSettings):
    """Block manager: tiers beyond device memory and when blocks move there."""

    component: ClassVar[str] = "kvbm"

    host_blocks: int = Field(0, ge=0, description="Blocks of the host tier; wins over host_bytes.")
    host_bytes: int = Field(256 * 1024**2, ge=0, description="Memory of the host tier, used if host_blocks is 0.")
    host_dir: str = Field(
        "",
        description="Folder on a memory file system (/dev/shm/NAME, or a hugetlbfs mount) for a host tier that all "
        "workers of the machine which name it share and that outlives them; empty for one of this process alone.",
    )
    host_quotas: dict[str, int] = Field(
        default_factory=dict[str, int],
        description="Most blocks of the host tier for each tenant that has a quota, as a JSON object; the others share "
        "the tier. Hints say whose a block is.",
    )
    offload: OffloadPolicy = Field(
        OffloadPolicy.EVICT,
        description="Copy a block to the host when it is complete (register) or when the device reuses it (evict).",
    )
    eviction: str = Field(
        "hinted",
        description="Eviction order of the tiers: hinted (least recently used first, but for what requests say of "
        "their sessions), lru, arc, s3fifo or an installed plug-in.",
    )
    admission: Admission = Field(
        Admission.COST,
        description="Offer every block found (always), or none that takes longer to fetch than to compute (cost).",
    )
    model: str = Field(
        "",
        description="What computed the blocks, for example name and revision; blocks of others are refused. Needed by "
        "tiers that outlive the process.",
    )
    write_queue_bytes: int = Field(
        64 * 1024**2, ge=1, description="Memory of the queue before each lower tier; blocks that find it full are lost."
    )
    disk_dir: str = Field("", description="Folder of the disk tier, one for each worker; empty for none.")
    disk_blocks: int = Field(0, ge=0, description="Blocks of the disk tier; wins over disk_bytes.")
    disk_bytes: int = Field(4 * 1024**3, ge=0, description="Size of the disk tier, used if disk_blocks is 0.")
    disk_offload: OffloadPolicy = Field(
        OffloadPolicy.EVICT,
        description="Write a block to disk when the host has it (register), when the host evicts it (evict), or then "
        "but only if it was used twice (second-touch).",
    )

    disk_codec: CodecName = Field(
        CodecName.NONE, description="How blocks lie on disk: none, or with loss int8 or fp8; slots are of equal size."
    )
    object_url: str = Field("", description="Object store tier, for example s3://bucket/prefix; empty for none.")
    object_endpoint: str = Field("", description="Address of an S3-compatible server; the provider's own if empty.")
    object_blocks: int = Field(0, ge=0, description="Blocks of the object tier; wins over object_bytes.")
    object_bytes: int = Field(64 * 1024**3, ge=0, description="Size of the object tier, used if object_blocks is 0.")
    object_offload: OffloadPolicy = Field(
        OffloadPolicy.EVICT, description="When a block goes to the object store: register, evict or second-touch."
    )
    object_codec: CodecName = Field(
        CodecName.NONE, description="How blocks lie in the object store: none, lz4, zstd, or with loss int8 or fp8."
    )

    store: str = Field("", description="A further tier, below all others: a plug-in of kv_tiers; empty for none.")
    store_options: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="What the plug-in of store is given, as a JSON object."
    )
    store_offload: OffloadPolicy = Field(
        OffloadPolicy.EVICT,
        description="When a block goes to the tier that store names: register, evict, second-touch.",
    )
    peer_discovery: str = Field(
        "",
        description="Discovery plane on which block managers of other workers are found, for example file:///run/kv or "
        "etcd://host:2379; empty to fetch from no peers.",
    )
    peer_plane: str = Field("tcp://127.0.0.1:0", description="Request plane on which peers send blocks.")
    peer_namespace: str = Field("dynamo", description="Namespace whose workers are peers.")
    peer_timeout_s: float = Field(0.5, gt=0, le=60, description="Longest wait of a step for blocks of a peer.")
    peer_blocks: int = Field(1 << 20, ge=1, description="Most blocks known of all peers together.")

    @model_validator(mode="after")
    def _has_room(self) -> KvbmSettings:
        if not self.host_blocks and not self.host_bytes:
            raise ValueError("host_blocks and host_bytes are both 0; give one of them, or leave the connector out")
        if self.host_dir and not self.model:
            raise ValueError("host_dir needs model: it outlives the process, and KV of other weights is wrong")
        if self.host_dir and self.host_quotas:
            raise ValueError("host_quotas need a host tier of one process; leave host_dir or host_quotas out")
        if self.disk_dir and not self.disk_blocks and not self.disk_bytes:
            raise ValueError("disk_blocks and disk_bytes are both 0; give one of them, or leave disk_dir out")
        if self.disk_dir and not self.model:
            raise ValueError("disk_dir needs model: a disk outlives the process, and KV of other weights is wrong")
        if self.disk_blocks and not self.disk_dir:
            raise ValueError("disk_blocks needs disk_dir, the folder of the disk tier")
        if self.disk_codec in {CodecName.LZ4, CodecName.ZSTD}:
            raise ValueError("disk_codec must be none, int8 or fp8: slots are of equal size, compressed blocks are not")
        return self

    @model_validator(mode="after")
    def _object_store_is_whole(self) -> KvbmSettings:
        if self.object_url and not self.model:
            raise ValueError("object_url needs model: objects outlive the process, and KV of other weights is wrong")
        if self.object_url and not self.object_blocks and not self.object_bytes:
            raise ValueError("object_blocks and object_bytes are both 0; give one of them, or leave object_url out")
        if not self.object_url and (self.object_blocks or self.object_endpoint):
            raise ValueError("object_blocks and object_endpoint need object_url, the address of the object tier")
        return self

    @model_validator(mode="after")
    def _peers_are_whole(self) -> KvbmSettings:
        if self.store_options and not self.store:
            raise ValueError("store_options needs store, the name of a plug-in of kv_tiers")
        if self.peer_discovery and not self.model:
            raise ValueError("peer_discovery needs model: KV that other weights computed is wrong")
        return self

    def object_capacity_blocks(self, block_bytes: int) -> int:
        """Blocks of the object tier for blocks of this size.

        Raises:
            ConfigurationError: if object_bytes is less than one block.
        """
        return self.object_blocks or _whole_blocks("object_bytes", self.object_bytes, block_bytes)

    def disk_capacity_blocks(self, block_bytes: int) -> int:
        """Blocks of the disk tier for blocks of this size.

        Raises:
            ConfigurationError: if disk_bytes is less than one block.
        """
        return self.disk_blocks or _whole_blocks("disk_bytes", self.disk_bytes, block_bytes)

    def queue_blocks(self, block_bytes: int) -> int:
        """Blocks of a write queue for blocks of this size.

        Raises:
            ConfigurationError: if write_queue_bytes is less than one block.
        """
        return _whole_blocks("write_queue_bytes", self.write_queue_bytes, block_bytes)

    def host_capacity_blocks(self, block_bytes: int) -> int:
        """Blocks of the host tier for blocks of this size.

        Raises:
            ConfigurationError: if host_bytes is less than one block.
        """
        return self.host_blocks or _whole_blocks("host_bytes", self.host_bytes, block_bytes)


def _whole_blocks(name: str, size: int, block_bytes: int) -> int:
    if size < block_bytes:
        raise ConfigurationError(f"{name} {size} holds no block of {block_bytes} bytes; give at least {block_bytes}")
    return size // block_bytes


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
