"""An error of a wrong type shows the value that is wrong."""

import pytest

from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._openai.fields import BodyDecoder, ChatRequest
from dynamo_frontend._openai.given import given_value

HEAD = b'{"model": "m", "messages": [{"role": "user", "content": "x"}], '


@pytest.mark.parametrize(
    ("rest", "param", "shown"),
    [
        (b'"temperature": "hot"}', "temperature", '"hot"'),
        (b'"n": [1, "a"]}', "n", '[1,"a"]'),
        (b'"tools": [{"type": "function", "function": 3}]}', "tools[0].function", "3"),
        (b'"seed": "' + b"9" * 200 + b'"}', "seed", f'"{"9" * 59}…'),
        (b'"logit_bias": {"5": "x"}}', "logit_bias[...]", "`str`."),
        (b'"temperature": "hot", nonsense', "temperature", "`str`."),
    ],
)
def test_the_value_is_named_where_it_can_be_found(rest, param, shown):
    with pytest.raises(InvalidRequestError) as caught:
        BodyDecoder(ChatRequest).decode(HEAD + rest)
    assert caught.value.param == param
    assert caught.value.message.endswith(f"{shown}" if shown.endswith(".") else f"{shown}.")


@pytest.mark.parametrize("path", [".a.b", ".a[0]", "[1]", ".nobody", ".a[...]", ".x..y"])
def test_a_path_that_leads_nowhere_shows_nothing(path):
    assert given_value(b'{"a": 1}', path) == ""
