from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._graph import Graph, GraphFile

GOOD = """
namespace: demo
services:
  web:
    component: frontend
    args: {http-port: 8000, trace: true, quiet: false, tag: [a, b]}
  prefill:
    component: worker
    replicas: 2
    role: prefill-pool
    args: [--engine, reference, --seed, 7]
    env: {THREADS: 2, MODE: fast}
    resources: {gpu: 1, cpu: 2, memory: 4Gi}
"""


@pytest.fixture
def read(tmp_path: Path):
    def _read(text: str) -> GraphFile:
        path = tmp_path / "graph.yaml"
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return GraphFile.read(path)

    return _read


def test_a_graph_has_flags_environment_and_roles(read) -> None:
    graph = read(GOOD).graph
    assert graph.services["web"].flags() == [
        *("--http-port", "8000", "--trace", "--no-quiet", "--tag", "a", "--tag", "b")
    ]
    prefill = graph.services["prefill"]
    assert prefill.flags() == ["--engine", "reference", "--seed", "7"]
    assert prefill.environment() == {"THREADS": "2", "MODE": "fast"}
    assert (prefill.resources.gpu, prefill.resources.cpu) == (1, "2")
    assert (graph.role_of("web"), graph.role_of("prefill")) == ("web", "prefill-pool")


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("services:\n  w:\n    component: worker\n    replcas: 2\n", 4, ["replcas", "unknown key", "replicas"]),
        ("services:\n  w:\n    component: worker\n    replicas: many\n", 4, ["services.w.replicas", "'many'"]),
        ("services:\n  w:\n    component: worker\n    replicas: -1\n", 4, ["replicas", "-1"]),
        ("services:\n  w:\n    replicas: 1\n", 2, ["services.w.component", "is required"]),
        ("namespace: demo\n", 1, ["services", "is required"]),
        ("services: {}\n", 1, ["services"]),
        ("services:\n  w: {component: worker}\n  w: {component: worker}\n", 3, ["'w' is given twice"]),
        ("services:\n  a: {component: worker, role: b}\n  b: {component: worker}\n", 1, ["role 'b'", "two services"]),
        ("services:\n  Bad_Name: {component: worker}\n", 1, ["Bad_Name", "lower-case"]),
        ("services:\n  w:\n    component: worker\n    resources:\n      memory: lots\n", 5, ["memory", "quantity"]),
        ("services:\n  w:\n    component: worker\n    resources: {disk: 1}\n", 4, ["disk", "cpu, memory, gpu"]),
        ("services:\n  w: [\n", 3, ["not YAML"]),
        ("- a\n- b\n", 1, ["mapping"]),
        ("", 1, ["mapping"]),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, parts: list[str], read) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(text)
    assert f"graph.yaml:{line}: " in caught.value.message
    for part in parts:
        assert part in caught.value.message


def test_the_schema_describes_every_field() -> None:
    schema = Graph.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]) == {"Service", "Resources"}
    for definition in (schema, *schema["$defs"].values()):
        assert all("description" in field for field in definition["properties"].values())
