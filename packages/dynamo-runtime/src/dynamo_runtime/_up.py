"""``dynamo up`` runs a deployment graph on this machine; ``dynamo render`` prints it for elsewhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import ResolvedSettings, resolve_settings
from dynamo_runtime._graph import Graph, GraphFile
from dynamo_runtime._host import HostedComponent, run_components
from dynamo_runtime._serve import STOP_MARGIN_S, child_flags, supervising_settings
from dynamo_runtime._settings import RuntimeSettings, SupervisorSettings
from dynamo_runtime._supervisor.component import SupervisorPlugin
from dynamo_runtime._supervisor.spec import ProcessSpec, component_command

_DRAIN_ORDER = ("worker", "router", "frontend", "planner")
"""Later ones drain first: no planner scales what drains, no frontend loses the workers it still streams from."""

_log = structlog.get_logger(__name__)


def up(argv: Sequence[str]) -> int:
    """Run ``dynamo up GRAPH.YAML``; return its exit status.

    Raises:
        ConfigurationError: for a wrong flag, or a graph that cannot work, with file and line.
    """
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        raise ConfigurationError("dynamo up takes a graph first: dynamo up graph.yaml [flags]")
    path, flags = ("", argv) if argv[0].startswith("-") else (argv[0], argv[1:])
    resolved = resolve_settings(
        "dynamo up GRAPH.YAML",
        (RuntimeSettings, SupervisorSettings),
        flags,
        description="Run the services of a graph on this machine; flags win over the file.",
    )
    file = GraphFile.read(Path(path))
    with ExitStack() as stack:
        runtime = _runtime_settings(resolved, file.graph, stack)
        specs = graph_specs(file, runtime)

        async def show() -> None:
            lines = [f"  {spec.role}: {spec.replicas}" for spec in specs]
            print("\n".join(["", f"{path} is up.", "", *lines, "", "Ctrl-C to stop.", ""]), flush=True)  # noqa: T201 - the screen

        hosted = HostedComponent("supervisor", SupervisorPlugin(specs), (resolved.get(SupervisorSettings),))
        return run_components([hosted], supervising_settings(runtime, specs), on_ready=show)


_RENDER_USAGE = """\
usage: dynamo render k8s GRAPH.YAML
       dynamo render schema

Print the manifests of a deployment graph for kubectl apply -f -, or the JSON schema of graphs."""


def render(argv: Sequence[str]) -> int:
    """Run ``dynamo render k8s GRAPH.YAML`` or ``dynamo render schema``; return the exit status."""
    if {"-h", "--help"} & set(argv):
        print(_RENDER_USAGE)  # noqa: T201 - the output of the command
        return 0
    if list(argv) == ["schema"]:
        print(json.dumps(Graph.model_json_schema(), indent=2))  # noqa: T201 - the output of the command
        return 0
    if len(argv) != 2 or argv[0] != "k8s":
        raise ConfigurationError("dynamo render takes: k8s GRAPH.YAML, or schema")
    from dynamo_runtime._kubernetes import render_manifests

    print(render_manifests(GraphFile.read(Path(argv[1]))), end="")  # noqa: T201 - the output of the command
    return 0


def graph_specs(file: GraphFile, runtime: RuntimeSettings) -> list[ProcessSpec]:
    """Return the processes of a graph, in the order in which others depend on them.

    Raises:
        ConfigurationError: if a component is not installed.
    """
    installed = plugins.available("components")
    specs: list[tuple[int, ProcessSpec]] = []
    for name, service in file.graph.services.items():
        if service.component not in installed:
            raise file.complain(["services", name, "component"], _not_installed(service.component))
        if service.resources.cpu or service.resources.memory:
            _log.warning("resources cpu and memory are not enforced on this machine", service=name)
        spec = ProcessSpec(
            role=file.graph.role_of(name),
            command=component_command(service.component, *child_flags(runtime), *service.flags()),
            replicas=service.replicas,
            env=service.environment(),
            drain_timeout_s=runtime.grace_period_s + runtime.drain_timeout_s + STOP_MARGIN_S,
            gpus=service.resources.gpu,
        )
        specs.append((_rank(service.component), spec))
    return [spec for _, spec in sorted(specs, key=lambda item: item[0])]


def _not_installed(component: str) -> str:
    try:
        plugins.load("components", component)
    except ConfigurationError as error:
        return error.message
    raise AssertionError(f"{component} is installed")


def _rank(component: str) -> int:
    return _DRAIN_ORDER.index(component) if component in _DRAIN_ORDER else _DRAIN_ORDER.index("router")


def _runtime_settings(resolved: ResolvedSettings, graph: Graph, stack: ExitStack) -> RuntimeSettings:
    """Take planes from flags, else from the file, else private ones that end with the command."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-up-"))
    wanted = {
        "namespace": graph.namespace,
        "discovery": graph.discovery or f"file://{folder}/discovery",
        "request_plane": graph.request_plane or f"unix://{folder}/sockets",
        "event_bus": graph.event_bus or "zmq://127.0.0.1:0",
        "status_port": "0",
    }
    chosen = {name: value for name, value in wanted.items() if resolved.origins[name].source == "default"}
    return RuntimeSettings.model_validate({**resolved.get(RuntimeSettings).model_dump(), **chosen})
