"""llama.cpp's own server inside this process: loaded, ready, locked to outsiders, and ended."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from dynamo_core.errors import ConfigurationError
from dynamo_worker._llamacpp._settings import LlamaCppSettings

_ALL_LAYERS = 9999


class LlamaServer:
    """A loaded model. Methods block; the server takes calls from many threads at once.

    It also listens on a loopback port of its own choice, which the library gives no way to leave out; a random key
    keeps everybody out of it.

    Args:
        settings: Options.
        context_length: Most tokens of prompt and output together.

    Raises:
        ConfigurationError: if xllamacpp is not installed, or the model cannot be loaded.
    """

    def __init__(self, settings: LlamaCppSettings, context_length: int) -> None:
        library = _import_library()
        params = library.CommonParams()
        params.model.path = settings.model
        params.n_ctx = settings.kv_cache_tokens or context_length * settings.max_num_seqs
        params.n_parallel = settings.max_num_seqs
        params.n_batch = settings.max_num_batched_tokens
        params.kv_unified = True  # a sequence may use all of the cache while others are short
        params.cache_ram_mib = settings.prompt_cache_mib
        params.n_gpu_layers = _ALL_LAYERS if settings.num_gpu_layers < 0 else settings.num_gpu_layers
        params.warmup = False
        params.verbosity = -1
        params.api_keys = [secrets.token_hex(16)]
        if settings.num_threads:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.num_threads
        try:
            self._server: Any = library.Server(params)
        except RuntimeError as error:
            raise ConfigurationError(f"llama.cpp cannot load {settings.model}: {error}") from error
        # A server that is released before its loop runs waits for its end forever; an answer shows that it runs.
        self.complete({"prompt": [0], "max_tokens": 1, "cache_prompt": False}, lambda _: False)

    def complete(self, body: dict[str, Any], callback: Callable[[dict[str, Any]], bool]) -> None:
        """Run a completion; its callback ends it by returning True."""
        self._server.handle_completions(body, callback)

    def close(self) -> None:
        """Release the model. No completion may run."""
        self._server = None


def _import_library() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise ConfigurationError(
            f"--engine llamacpp needs xllamacpp, which cannot be imported ({error}); "
            "install it with: pip install 'dynamo-worker[llamacpp]'"
        ) from error
    return xllamacpp
