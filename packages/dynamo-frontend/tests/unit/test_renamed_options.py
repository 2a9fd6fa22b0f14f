"""Options that were renamed are still understood."""

import pytest

from dynamo_core.settings import resolve_settings
from dynamo_frontend import FrontendSettings


def test_the_former_names_of_the_busy_options_work_and_warn():
    argv = ["--active-decode-blocks-threshold", "0.5", "--active-prefill-tokens-threshold", "100"]
    with pytest.warns(FutureWarning, match="is called --busy-"):
        settings = resolve_settings("dynamo frontend", (FrontendSettings,), argv, environ={}).get(FrontendSettings)
    assert (settings.busy_kv_share, settings.busy_prompt_tokens) == (0.5, 100)


def test_the_former_names_are_read_and_written_in_code_too():
    with pytest.warns(FutureWarning, match="is called busy_kv_share now"):
        settings = FrontendSettings.model_validate({"active_decode_blocks_threshold": 0.25})
    with pytest.warns(DeprecationWarning, match="use busy_kv_share"):
        assert settings.active_decode_blocks_threshold == 0.25
    with pytest.warns(DeprecationWarning, match="use busy_prompt_tokens"):
        assert settings.active_prefill_tokens_threshold is None
