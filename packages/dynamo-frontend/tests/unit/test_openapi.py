"""The OpenAPI document describes what is served."""

import re

import msgspec

from dynamo_frontend._openai.fields import ChatRequest
from dynamo_frontend._openapi import document


def references(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for item in node:
            yield from references(item)


def test_every_reference_leads_somewhere():
    found = document()
    names = list(references(found))
    assert names
    for name in names:
        section, key = re.fullmatch(r"#/components/(\w+)/(\w+)", name).groups()
        assert key in found["components"][section], name


def test_request_schemas_are_the_decoders():
    found = document()["components"]["schemas"]["ChatRequest"]
    assert set(found["properties"]) == set(ChatRequest.__struct_fields__)
    assert found["additionalProperties"] is False
    assert set(found["required"]) == {"model", "messages"}


async def test_every_path_of_the_document_is_served(stack):
    await stack.start()
    served = msgspec.json.decode((await stack.get("/openapi.json")).body)
    assert served == document()
    for path, methods in served["paths"].items():
        for method in methods:
            target = path.replace("{model}", "tiny")
            reply = await (stack.get(target) if method == "get" else stack.post(target, {}))
            assert str(reply.status) in methods[method]["responses"], path
            assert reply.status in ((404,) if "{id}" in path else (200, 400)), path
