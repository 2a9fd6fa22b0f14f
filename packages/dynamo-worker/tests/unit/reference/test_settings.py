"""Options of the engine: cheap to read, clear when wrong."""

from pathlib import Path

import pytest
from parts import TINYLM, engine_context, write_model

from dynamo_core.errors import ConfigurationError
from dynamo_worker._reference._settings import ReferenceSettings, bundled_models
from dynamo_worker._reference.engine import ReferenceEngine


def test_defaults_name_the_bundled_model() -> None:
    settings = ReferenceSettings.from_args([], environ={})
    assert settings.model_folder == TINYLM
    assert settings.model_name == "tinylm"
    assert bundled_models() == ["tinylm"]


def test_flags_win_over_variables() -> None:
    environ = {"DYN_REFERENCE_BLOCK_SIZE": "8", "DYN_REFERENCE_NUM_BLOCKS": "600", "DYN_CONFIG": "/not/ours"}
    settings = ReferenceSettings.from_args(["--block-size", "32", "--no-enable-prefix-caching"], environ=environ)
    assert (settings.block_size, settings.num_blocks, settings.enable_prefix_caching) == (32, 600, False)


def test_a_folder_is_served_under_its_own_name_or_another(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine")
    assert ReferenceSettings.from_args(["--model", str(folder)], environ={}).model_name == "mine"
    flags = ["--model", str(folder), "--served-model-name", "other"]
    assert ReferenceSettings.from_args(flags, environ={}).model_name == "other"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--block-sise", "4"], "did you mean --block-size"),
        (["--block-size", "0"], "--block-size has the value '0'"),
        (["--kv-cache-dtype", "f8"], "--kv-cache-dtype"),
        (["--seed", "-1"], "--seed"),
        (["--model", "/nowhere/at/all"], "--model has the value '/nowhere/at/all', which is not a folder"),
        (["--model", "tinylmm"], "tinylm"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(args: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ReferenceEngine.from_args(args)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        ReferenceEngine.from_args(["--model", str(tmp_path)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-blocks", "10"], "--num-blocks has the value 10.*use --num-blocks 256 or --max-model-len 160"),
        (["--max-model-len", "5000"], "--max-model-len has the value 5000, the model's context is 4096"),
    ],
)
async def test_options_that_do_not_fit_the_model_fail_the_start(args: list[str], message: str) -> None:
    engine = ReferenceEngine.from_args(args)
    with pytest.raises(ConfigurationError, match=message):
        await engine.start(engine_context())
    await engine.cleanup()
