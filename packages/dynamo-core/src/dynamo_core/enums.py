"""Enums that survive a newer peer: a value this release does not know decodes to ``UNKNOWN``."""

from __future__ import annotations

import enum
from typing import Self


class WireEnum(enum.Enum):
    """Base of every enum on the wire. Subclasses define a member named ``UNKNOWN``."""

    @classmethod
    def _missing_(cls, value: object) -> Self:
        return cls["UNKNOWN"]


class Modality(WireEnum):
    """What a request asks for or an output carries."""

    TEXT = "text"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"
    TENSOR = "tensor"
    UNKNOWN = "unknown"


class PartKind(WireEnum):
    """Form of one content part."""

    TEXT = "text"
    TOKENS = "tokens"
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"
    TENSOR = "tensor"
    SCORE = "score"
    JSON = "json"
    UNKNOWN = "unknown"


class FinishReason(WireEnum):
    """Why a choice ended.

    ``STOP`` is a stop string or stop token of the request, ``EOS`` the model's own end.
    """

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    CONTENT_FILTER = "content_filter"
    ERROR = "error"
    UNKNOWN = "unknown"


class WorkerType(WireEnum):
    """Role of a worker in serving a model."""

    AGGREGATED = "aggregated"
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"
    UNKNOWN = "unknown"


class ModelType(WireEnum):
    """An API a model can answer."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    TENSOR = "tensor"
    IMAGES = "images"
    AUDIOS = "audios"
    VIDEOS = "videos"
    UNKNOWN = "unknown"


class ModelInput(WireEnum):
    """What the engine takes."""

    TOKENS = "tokens"
    TEXT = "text"
    TENSOR = "tensor"
    UNKNOWN = "unknown"


class Tier(WireEnum):
    """Where a KV block lies, nearest first: G1 device, G2 host, G3 disk, G4 external (object store or peer)."""

    DEVICE = "device"
    HOST = "host_pinned"
    DISK = "disk"
    EXTERNAL = "external"
    UNKNOWN = "unknown"


class HealthState(WireEnum):
    """State of one component as ``/ready`` shows it."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"
    UNKNOWN = "unknown"
