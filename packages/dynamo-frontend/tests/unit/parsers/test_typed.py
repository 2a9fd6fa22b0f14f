"""Types of arguments that are written as text."""

import json

import pytest

from dynamo_frontend._parsers.typed import STRING, UNKNOWN, item_schema, json_of, property_schema, schema_types


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        (None, set()),
        ({}, set()),
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"type": "Int"}, {"integer"}),
        ({"type": "varchar"}, set()),
        ({"type": [1, "string"]}, {"string"}),
        (
            {"enum": ["a", None, 1, 1.5, True, {}, []]},
            {"string", "null", "integer", "number", "boolean", "object", "array"},
        ),
        ({"type": "string", "enum": [1]}, {"string"}),
        ({"anyOf": [{"type": "string"}, {"oneOf": [{"type": "array"}]}]}, {"string", "array"}),
        ({"anyOf": "odd"}, set()),
    ],
)
def test_types_that_a_schema_allows(schema, types):
    assert schema_types(schema) == types


def test_a_schema_nested_without_end_is_read_to_a_bound():
    schema = {"type": "string"}
    for _ in range(100):
        schema = {"anyOf": [schema]}
    assert schema_types(schema) == set()


def test_properties_and_items_are_found_in_alternatives():
    schema = {"anyOf": [{"type": "null"}, {"properties": {"a": {"type": "integer"}}, "items": {"type": "string"}}]}
    assert property_schema(schema, "a") == {"type": "integer"}
    assert property_schema(schema, "b") is None
    assert property_schema({"additionalProperties": {"type": "number"}}, "b") == {"type": "number"}
    assert item_schema(schema) == {"type": "string"}
    assert item_schema({"items": True}) is None


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("3", {"integer"}, 3),
        (" 3\n", {"integer"}, 3),
        ("3", {"number"}, 3),
        ("3.5", {"number"}, 3.5),
        ("3.5", {"integer"}, "3.5"),
        ("3", STRING, "3"),
        ("3", {"string", "integer"}, 3),
        ("x", {"integer"}, "x"),
        (" x ", STRING, " x "),
        ("TRUE", {"boolean"}, True),
        ("yes", {"boolean"}, "yes"),
        ("None", {"null"}, "None"),
        ("Null", {"null", "string"}, None),
        ('{"a": 1}', {"object"}, {"a": 1}),
        ("{'a': True}", {"object"}, {"a": True}),
        ("(1, 2)", {"array"}, [1, 2]),
        ("{'a', 'b'}", {"object"}, "{'a', 'b'}"),
        ('[1, "b"', {"array"}, '[1, "b"'),
        ('"q"', STRING, '"q"'),
        ('"q"', UNKNOWN, "q"),
        ("7", UNKNOWN, 7),
        ("free text", UNKNOWN, "free text"),
        ("", UNKNOWN, ""),
        ("", {"integer"}, ""),
        ("NaN", {"number"}, "NaN"),
        ("1e999", {"string"}, "1e999"),
        ("(" * 5000, {"array"}, "(" * 5000),
    ],
)
def test_values_get_the_type_of_their_schema_or_stay_text(text, types, value):
    assert json.loads(json_of(text, frozenset(types))) == value
