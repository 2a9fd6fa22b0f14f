from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._graph import GraphFile
from dynamo_runtime._kubernetes import render_manifests

GRAPH = """
namespace: demo
discovery: etcd://etcd:2379
image: registry.example/dynamo:1
services:
  web: {component: frontend, args: [--http-port, 8080], port: 8080}
  worker:
    component: worker
    replicas: 3
    env: {MODE: fast}
    resources: {gpu: 2, cpu: 500m, memory: 4Gi}
"""


def graph_of(tmp_path: Path, text: str) -> GraphFile:
    path = tmp_path / "graph.yaml"
    path.write_text(text.lstrip("\n"), encoding="utf-8")
    return GraphFile.read(path)


def rendered(tmp_path: Path, text: str = GRAPH) -> dict[tuple[str, str], dict[str, Any]]:
    documents = yaml.safe_load_all(render_manifests(graph_of(tmp_path, text)))
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def test_each_service_is_a_deployment_and_clients_get_a_service(tmp_path: Path) -> None:
    found = rendered(tmp_path)
    assert set(found) == {("Deployment", "demo-web"), ("Service", "demo-web"), ("Deployment", "demo-worker")}
    worker = found["Deployment", "demo-worker"]
    assert worker["spec"]["replicas"] == 3
    assert worker["spec"]["selector"]["matchLabels"] == worker["spec"]["template"]["metadata"]["labels"]
    web = found["Service", "demo-web"]
    assert web["spec"]["ports"] == [{"name": "http", "port": 8080, "targetPort": "http"}]
    assert web["spec"]["selector"] == found["Deployment", "demo-web"]["spec"]["selector"]["matchLabels"]


def test_containers_run_the_component_on_planes_that_reach_other_pods(tmp_path: Path) -> None:
    found = rendered(tmp_path)
    (worker,) = found["Deployment", "demo-worker"]["spec"]["template"]["spec"]["containers"]
    (web,) = found["Deployment", "demo-web"]["spec"]["template"]["spec"]["containers"]
    flags = worker["args"]
    assert flags[0] == "worker"
    assert flags[flags.index("--discovery") + 1] == "etcd://etcd:2379"
    assert flags[flags.index("--request-plane") + 1] == "tcp://$(POD_IP):0"
    assert {"name": "MODE", "value": "fast"} in worker["env"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert worker["resources"]["requests"] == {"cpu": "500m", "memory": "4Gi"}
    assert worker["readinessProbe"]["httpGet"] == {"path": "/ready", "port": 9090}
    assert web["args"][-4:] == ["--http-port", "8080", "--http-host", "0.0.0.0"]


def test_discovery_in_the_cluster_gets_an_account_and_readiness(tmp_path: Path) -> None:
    found = rendered(tmp_path, GRAPH.replace("etcd://etcd:2379", "k8s://?service=demo-dynamo"))
    kinds = {kind for kind, name in found if name == "demo-dynamo"}
    assert kinds == {"ServiceAccount", "Role", "RoleBinding", "Service"}
    allowed = {rule["resources"][0]: rule["verbs"] for rule in found["Role", "demo-dynamo"]["rules"]}
    assert {"create", "patch", "deletecollection"} <= set(allowed["configmaps"])
    assert set(allowed["endpointslices"]) == {"get", "list", "watch"}
    pod = found["Deployment", "demo-worker"]["spec"]["template"]
    ready = found["Service", "demo-dynamo"]["spec"]["selector"]
    assert ready.items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["serviceAccountName"] == found["RoleBinding", "demo-dynamo"]["subjects"][0]["name"]
    told = {each["name"] for each in pod["spec"]["containers"][0]["env"] if "valueFrom" in each}
    assert told == {"POD_IP", "POD_NAME", "POD_UID"}
    plain = rendered(tmp_path)["Deployment", "demo-worker"]["spec"]["template"]["spec"]
    assert "serviceAccountName" not in plain


def test_every_value_that_must_be_text_is_text(tmp_path: Path) -> None:
    for document in rendered(tmp_path).values():
        if document["kind"] == "Deployment":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            assert all(isinstance(argument, str) for argument in container["args"])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (GRAPH.replace("etcd://etcd:2379", "file:///tmp/x"), "graph.yaml:2: discovery: file:///tmp/x does not reach"),
        (
            GRAPH.replace("discovery: etcd://etcd:2379\n", ""),
            "discovery: this machine alone, without a URL, does not reach",
        ),
        (GRAPH.replace("image: registry.example/dynamo:1\n", ""), "graph.yaml:4: services.web: has no container image"),
    ],
)
def test_what_only_a_cluster_needs_is_asked_for(text: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        render_manifests(graph_of(tmp_path, text))
    assert part in caught.value.message
