import json

import pytest

from dynamo_tools.semver.change import Level
from dynamo_tools.semver.schemas import compare, dump

OLD = {
    "wire.v1": {
        "$defs": {
            "A": {
                "properties": {"x": {"type": "integer", "default": 1}, "y": {"enum": ["a", "b"]}},
                "required": ["y"],
                "type": "object",
            }
        },
        "$ref": "#/$defs/A",
    },
    "tuple.v1": {"prefixItems": [{"type": "integer"}], "minItems": 1},
}


def level(**edits) -> Level:
    new = json.loads(json.dumps(OLD))
    kind = new["wire.v1"]["$defs"]["A"]
    for name, value in edits.items():
        kind["properties"] |= {name: value}
        if value is None:
            del kind["properties"][name]
    return max(change.level for change in compare(json.dumps(OLD), json.dumps(new)))


@pytest.mark.parametrize(
    "edits", [{"x": None}, {"x": {"type": "string", "default": 1}}, {"y": {"enum": ["a"]}}, {"y": {"enum": ["a", "c"]}}]
)
def test_breaks_are_major(edits):
    assert level(**edits) is Level.MAJOR


@pytest.mark.parametrize(
    "edits", [{"z": {"type": "integer"}}, {"y": {"enum": ["a", "b", "c"]}}, {"x": {"type": "integer", "default": 2}}]
)
def test_additions_are_minor(edits):
    assert level(**edits) is Level.MINOR


def test_arrays_grow_at_their_end():
    item = {"type": "string"}
    for items, expected in (([{"type": "integer"}, item], Level.MINOR), ([item, {"type": "integer"}], Level.MAJOR)):
        new = {**OLD, "tuple.v1": {"prefixItems": items, "minItems": 1}}
        assert max(change.level for change in compare(json.dumps(OLD), json.dumps(new))) is expected


def test_a_new_required_field_is_major():
    new = json.loads(json.dumps(OLD))
    new["wire.v1"]["$defs"]["A"]["required"].append("x")
    assert [str(change.level) for change in compare(json.dumps(OLD), json.dumps(new))] == ["major"]


def test_words_are_left_out_of_a_dump(tree):
    settings = "from typing import ClassVar\nfrom pydantic import BaseModel, Field\n\n\n"
    settings += "class DynamoSettings(BaseModel):\n    component: ClassVar[str] = 'router'\n\n\n"
    settings += "class RouterSettings(DynamoSettings):\n    wait_s: float = Field(1.0, description='Words.')\n"
    tree.write("packages/dynamo-router/src/dynamo_router/_settings.py", settings)
    written = dump(tree.workspace(), tree.workspace().find("router"))
    assert json.loads(written)["settings.router"]["properties"] == {"wait_s": {"default": 1.0, "type": "number"}}


def test_a_package_without_options_has_no_schemas(tree):
    assert dump(tree.workspace(), tree.workspace().find("worker")) == ""
