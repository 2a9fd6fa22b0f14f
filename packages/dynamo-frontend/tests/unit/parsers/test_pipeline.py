"""Parsers within the whole path: they know the request's tools and what its prompt says."""

import json

import msgspec
import pytest

from dynamo_core.cards import ModelRuntimeConfig

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]


def use(stack, *, tools="none", reasoning="none"):
    config = ModelRuntimeConfig(tool_call_parser=tools, reasoning_parser=reasoning)
    stack.card = msgspec.structs.replace(stack.card, runtime_config=config)


async def message(stack, **fields):
    reply = await stack.chat(**fields)
    assert reply.status == 200
    return reply.json["choices"][0]["message"]


@pytest.mark.parametrize(
    ("parser", "output"),
    [
        ("qwen3_coder", "<function=get_weather><parameter=city>7</parameter><parameter=days>7</parameter></function>"),
        (
            "glm47",
            "get_weather<arg_key>city</arg_key><arg_value>7</arg_value><arg_key>days</arg_key><arg_value>7</arg_value>",
        ),
    ],
)
async def test_arguments_have_the_types_of_the_tools_schema(stack, parser, output):
    use(stack, tools=parser)
    stack.say(f"<tool_call>{output}</tool_call>")
    await stack.start()
    (call,) = (await message(stack, tools=TOOLS))["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "7", "days": 7}


async def test_a_bare_object_is_a_call_only_if_it_names_a_tool(stack):
    use(stack, tools="default")
    await stack.start()
    stack.say('{"name": "Ann", "arguments": {}}')
    assert (await message(stack, tools=TOOLS))["content"] == '{"name": "Ann", "arguments": {}}'
    stack.say('{"name": "get_weather", "arguments": {"city": "Oslo"}}')
    assert len((await message(stack, tools=TOOLS))["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("start", "output", "reasoning", "content"),
    [
        ("<think>", "why</think>so", "why", "so"),
        ("<think></think>", "so", None, "so"),
        ("Well,", "so", "so", ""),
    ],
)
async def test_the_prompt_says_whether_the_reasoning_is_open(stack, start, output, reasoning, content):
    use(stack, reasoning="deepseek_r1")
    stack.say(output)
    await stack.start()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": start}]
    found = await message(stack, messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert found.get("reasoning_content") == reasoning
    assert found["content"] == content


async def test_a_model_with_an_unknown_parser_is_not_served(stack):
    use(stack, tools="nonesuch")
    await stack.start(workers=0)
    await stack.add_worker(1)
    stack.card = msgspec.structs.replace(stack.card, name="other", aliases=(), runtime_config=ModelRuntimeConfig())
    await stack.add_worker(2)
    await stack.ready("other")
    assert "tiny" not in (await stack.get("/ready")).json["models"]
