"""The model card: what a worker serves, and when a set of workers can serve it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import msgspec

from dynamo_core.enums import Modality, ModelInput, ModelType, WorkerType
from dynamo_core.tokens import XXH3_1337_V1

GENERATE_REQUEST = "dynamo.generate_request.v1"
GENERATE_CHUNK = "dynamo.generate_chunk.v1"


class EndpointTypes(msgspec.Struct, frozen=True, omit_defaults=True):
    """Schemas of what an endpoint takes and gives, so that any engine fits the same planes."""

    request: str = GENERATE_REQUEST
    response: str = GENERATE_CHUNK


class CheckedFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file of the model by path or URL, with its BLAKE2b-128 checksum in hex."""

    uri: str
    checksum: str = ""


class ModelRuntimeConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the engine found out at start. It takes no part in the card's checksum.

    Attributes:
        total_kv_blocks: Device blocks per dp rank.
        max_num_seqs: Most requests that run at once.
        max_num_batched_tokens: Most tokens in one step.
        tool_call_parser: Parser of tool calls in the output text.
        reasoning_parser: Parser of reasoning in the output text.
        data_parallel_start_rank: First dp rank of this instance.
        data_parallel_size: How many dp ranks it has.
        enable_local_indexer: Whether it answers KV event queries.
        taints: Scheduling labels.
        topology_domains: Domain name to value.
        disaggregated_endpoint: Where hand-offs are fetched, engine-specific.
        runtime_data: Anything else of the engine.
    """

    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    data_parallel_start_rank: int = 0
    data_parallel_size: int = 1
    enable_local_indexer: bool = True
    taints: tuple[str, ...] = ()
    topology_domains: dict[str, str] = {}
    disaggregated_endpoint: dict[str, Any] | None = None
    runtime_data: dict[str, Any] = {}


class LoraInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """The adapter a card stands for."""

    name: str
    base_model: str = ""
    max_gpu_lora_count: int | None = None


class ModelCard(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one worker publishes for one model.

    Attributes:
        name: Served model name.
        model_path: Folder or URL with the model's files; where ``files`` relative URIs are resolved.
        files: Logical name (``tokenizer``, ``tokenizer_config``, ``chat_template``, ``config``,
            ``generation_config``) to file.
        context_length: Most tokens of prompt and output together; 0 if unlimited or not applicable.
        kv_block_size: Tokens per KV block; 0 if the engine has no reusable KV cache.
        hash_algorithm: Algorithm of the local hashes in its events.
        model_types: APIs it answers.
        model_input: What its engine takes.
        input_modalities: Kinds of content it takes.
        output_modalities: Kinds of output it gives.
        endpoint_types: Schemas of its endpoint.
        worker_type: Its role.
        needs: Roles that must be present for it to serve: any one of the inner lists, all of its members.
        aliases: Further served names.
        eos_token_ids: Tokens that end an output.
        capabilities: Engine abilities by name, for example ``logprobs``, ``guided_decoding``, ``lora``.
        runtime_config: What the engine found out at start.
        router_config: Router settings of this worker set; they replace the router's defaults wholesale.
        user_data: Free.
        version: Version of this record's meaning.
    """

    name: str
    model_path: str = ""
    files: dict[str, CheckedFile] = {}
    context_length: int = 0
    kv_block_size: int = 0
    hash_algorithm: str = XXH3_1337_V1
    model_types: tuple[ModelType, ...] = (ModelType.CHAT, ModelType.COMPLETIONS)
    model_input: ModelInput = ModelInput.TOKENS
    input_modalities: tuple[Modality, ...] = (Modality.TEXT,)
    output_modalities: tuple[Modality, ...] = (Modality.TEXT,)
    endpoint_types: EndpointTypes = EndpointTypes()
    worker_type: WorkerType = WorkerType.AGGREGATED
    needs: tuple[tuple[WorkerType, ...], ...] = ()
    aliases: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    lora: LoraInfo | None = None
    capabilities: tuple[str, ...] = ()
    runtime_config: ModelRuntimeConfig = msgspec.field(default_factory=ModelRuntimeConfig)
    router_config: dict[str, Any] | None = None
    user_data: dict[str, Any] = {}
    version: int = 1

    @property
    def checksum(self) -> str:
        """Hex digest over everything that members of one worker set must agree on."""
        agreed = msgspec.structs.replace(
            self, runtime_config=ModelRuntimeConfig(), user_data={}, model_path="", files={}
        )
        plain = msgspec.to_builtins(agreed, str_keys=True)
        digest = hashlib.blake2b(msgspec.json.encode(plain, order="sorted"), digest_size=16)
        for name in sorted(self.files):
            digest.update(name.encode() + b"\0" + self.files[name].checksum.encode() + b"\0")
        return digest.hexdigest()

    def is_ready(self, present: Collection[WorkerType]) -> bool:
        """Whether the roles in ``present`` satisfy this card's ``needs``."""
        return not self.needs or any(all(role in present for role in group) for group in self.needs)


def is_model_ready(cards: Collection[ModelCard]) -> bool:
    """Whether a model served by these cards can answer: someone serves it, and each role's needs are met."""
    present = {card.worker_type for card in cards}
    answers = present & {WorkerType.AGGREGATED, WorkerType.DECODE}
    return bool(answers) and all(card.is_ready(present) for card in cards)
