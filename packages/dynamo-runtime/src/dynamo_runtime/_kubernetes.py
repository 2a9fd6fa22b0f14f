"""A deployment graph as Kubernetes manifests: one Deployment a service, one Service where clients connect.

With ``k8s://`` discovery also what that needs: an account that may keep records and leases, and a Service whose
EndpointSlices say which pods are ready.
"""

from __future__ import annotations

from typing import Any

import yaml

from dynamo_runtime._graph import GraphFile, Resources, Service
from dynamo_runtime._settings import RuntimeSettings
from dynamo_runtime._substrate import scheme_of

STATUS_PORT = 9090
FRONTEND_PORT = 8000
GPU_RESOURCE = "nvidia.com/gpu"
_PART_OF = "app.kubernetes.io/part-of"
_RBAC = "rbac.authorization.k8s.io"
_LOCAL_DISCOVERY = ("", "file", "mem")


def render_manifests(file: GraphFile) -> str:
    """Return the manifests as one YAML stream.

    Raises:
        ConfigurationError: if the graph lacks what only a cluster needs: an image, a discovery plane off one machine.
    """
    graph = file.graph
    if scheme_of(graph.discovery) in _LOCAL_DISCOVERY:
        raise file.complain(
            ["discovery"],
            f"{graph.discovery or 'this machine alone, without a URL,'} does not reach across machines; "
            "give for example etcd://...",
        )
    manifests = _discovery_manifests(file) if _in_cluster(file) else []
    for name, service in graph.services.items():
        manifests.append(_deployment(file, name, service))
        if _port(service):
            manifests.append(_service(file, name, service))
    return yaml.safe_dump_all(manifests, sort_keys=False)


def _deployment(file: GraphFile, name: str, service: Service) -> dict[str, Any]:
    labels = _labels(file, name, service)
    settings = RuntimeSettings()
    grace_s = int(settings.grace_period_s + settings.drain_timeout_s) + 10
    pod: dict[str, Any] = {"terminationGracePeriodSeconds": grace_s, "containers": [_container(file, name, service)]}
    if _in_cluster(file):
        pod["serviceAccountName"] = _discovery_name(file)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": _object_name(file, name), "labels": labels},
        "spec": {
            "replicas": service.replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _container(file: GraphFile, name: str, service: Service) -> dict[str, Any]:
    image = service.image or file.graph.image
    if not image:
        raise file.complain(["services", name], "has no container image; give image here or at the top")
    ports = [{"name": "status", "containerPort": STATUS_PORT}]
    if _port(service):
        ports.append({"name": "http", "containerPort": _port(service)})
    fields = {"POD_IP": "status.podIP"}
    if _in_cluster(file):
        fields |= {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid"}
    told = [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in fields.items()]
    container: dict[str, Any] = {
        "name": name,
        "image": image,
        "command": ["dynamo"],
        "args": _arguments(file, service),
        "env": [*told, *({"name": key, "value": value} for key, value in service.environment().items())],
        "ports": ports,
        "livenessProbe": _probe("/live", 10),
        "readinessProbe": _probe("/ready", 2),
        "startupProbe": {**_probe("/ready", 5), "failureThreshold": 360},
    }
    if resources := _resources(service.resources):
        container["resources"] = resources
    return container


def _arguments(file: GraphFile, service: Service) -> list[str]:
    graph = file.graph
    flags = {
        "--namespace": graph.namespace,
        "--discovery": graph.discovery,
        # Kubernetes replaces $(POD_IP) before the container starts.
        "--request-plane": graph.request_plane or "tcp://$(POD_IP):0",
        "--event-bus": graph.event_bus or "zmq://$(POD_IP):0",
        "--status-host": "0.0.0.0",
        "--status-port": str(STATUS_PORT),
        "--log-format": "json",
    }
    own = service.flags()
    if service.component == "frontend" and "--http-host" not in own:
        own = [*own, "--http-host", "0.0.0.0"]
    return [service.component, *(part for pair in flags.items() for part in pair), *own]


def _probe(path: str, period_s: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": STATUS_PORT}, "periodSeconds": period_s}


def _resources(resources: Resources) -> dict[str, Any]:
    requests = {key: value for key, value in (("cpu", resources.cpu), ("memory", resources.memory)) if value}
    limits: dict[str, Any] = {"memory": resources.memory} if resources.memory else {}
    if resources.gpu:
        limits[GPU_RESOURCE] = resources.gpu
    found = {"requests": requests, "limits": limits}
    return {key: value for key, value in found.items() if value}


def _service(file: GraphFile, name: str, service: Service) -> dict[str, Any]:
    labels = _labels(file, name, service)
    port = {"name": "http", "port": _port(service), "targetPort": "http"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": _object_name(file, name), "labels": labels},
        "spec": {"selector": labels, "ports": [port]},
    }


def _in_cluster(file: GraphFile) -> bool:
    return scheme_of(file.graph.discovery) == "k8s"


def _discovery_name(file: GraphFile) -> str:
    return f"{file.graph.namespace}-dynamo"


def _discovery_manifests(file: GraphFile) -> list[dict[str, Any]]:
    metadata = {"name": _discovery_name(file), "labels": {_PART_OF: file.graph.namespace}}
    verbs = ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"]
    rules = [
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": verbs},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": verbs},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
    ]
    role = {"apiGroup": _RBAC, "kind": "Role", "name": metadata["name"]}
    subject = {"kind": "ServiceAccount", "name": metadata["name"]}
    status = {"name": "status", "port": STATUS_PORT}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": f"{_RBAC}/v1", "kind": "Role", "metadata": metadata, "rules": rules},
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": role,
            "subjects": [subject],
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"clusterIP": "None", "selector": {_PART_OF: file.graph.namespace}, "ports": [status]},
        },
    ]


def _port(service: Service) -> int:
    return service.port or (FRONTEND_PORT if service.component == "frontend" else 0)


def _object_name(file: GraphFile, name: str) -> str:
    return f"{file.graph.namespace}-{name}"


def _labels(file: GraphFile, name: str, service: Service) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "dynamo",
        _PART_OF: file.graph.namespace,
        "app.kubernetes.io/component": service.component,
        "dynamo/role": file.graph.role_of(name),
    }
