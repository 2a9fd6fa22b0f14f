"""Chat templates behave as they do in the model's training code."""

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_frontend._template import ChatTemplate

USER = [{"role": "user", "content": "Hi <b> & é"}]


def template(source, **special):
    return ChatTemplate(source, special, SystemClock())


def render(source, messages=USER, **options):
    return template(source, bos_token="<s>", eos_token="</s>").render(messages, **options)


def test_special_tokens_and_generation_prompt():
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    assert render(source) == "<s>Hi <b> & é</s>A:"
    assert render(source, add_generation_prompt=False) == "<s>Hi <b> & é</s>"


def test_blocks_are_trimmed():
    assert render("{% if true %}\n  x\n  {% endif %}\ny") == "  x\ny"


def test_tojson_escapes_nothing_and_indents():
    assert (
        render("{{ tools | tojson }}", tools=[{"a": "<é>", "b": None, "c": True}])
        == '[{"a": "<é>", "b": null, "c": true}]'
    )
    assert render("{{ tools | tojson(indent=1) }}", tools=[{"a": 1}]) == '[\n {\n  "a": 1\n }\n]'


def test_python_methods_loop_controls_and_namespace():
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% break %}{% endfor %}"
        "{{ ns.n }}{{ messages[0].content.split(' ')[0].upper() }}"
    )
    assert render(source) == "1HI"


def test_undefined_chains_as_in_jinja():
    assert render("{{ messages[0].tool_calls is defined }}{% if nothing.at.all %}x{% endif %}") in ("False", "false")


def test_strftime_now():
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


def test_training_markers_print_nothing():
    assert render("{% generation %}x{% endgeneration %}") == "x"


def test_template_refusal_is_the_callers_error():
    with pytest.raises(InvalidRequestError, match="no system here"):
        render("{{ raise_exception('no system here') }}")


def test_render_failure_does_not_quote_the_conversation():
    with pytest.raises(InvalidRequestError) as caught:
        render("{{ messages[0].content.no_such_method() }}", [{"role": "user", "content": "secret words"}])
    assert "secret words" not in str(caught.value)


def test_endless_template_is_stopped():
    with pytest.raises(InvalidRequestError):
        render("{% for a in range(100000) %}{% for b in range(100000) %}{{ b }}{% endfor %}{% endfor %}")


def test_bad_source_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="does not parse"):
        template("{% if %}")


def test_extra_variables_reach_the_template_but_not_over_its_own():
    assert render("{{ enable_thinking }}", extra={"enable_thinking": "yes"}) == "yes"
    with pytest.raises(InvalidRequestError, match="add_generation_prompt"):
        render("x", extra={"add_generation_prompt": True})


def test_final_message_is_left_open():
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    messages = [*USER, {"role": "assistant", "content": "So "}]
    assert render(source, messages, add_generation_prompt=False, continue_final_message=True) == "[Hi <b> & é][So"
    with pytest.raises(InvalidRequestError):
        render(source, [{"role": "assistant", "content": ""}], continue_final_message=True)
