"""``dynamo serve``: the whole stack on this machine, without configuration."""

from __future__ import annotations

import difflib
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import ResolvedSettings, resolve_settings
from dynamo_runtime._host import HostedComponent, run_components
from dynamo_runtime._screen import ServeScreen
from dynamo_runtime._settings import RuntimeSettings, ServeSettings, SupervisorSettings
from dynamo_runtime._supervisor.component import SupervisorPlugin
from dynamo_runtime._supervisor.spec import ProcessSpec, component_command

STOP_MARGIN_S = 2.0
"""What a process gets beyond its own drain timeout before it is killed."""

_KINDS = (RuntimeSettings, ServeSettings, SupervisorSettings)
_CLOSE_ENOUGH = 0.8


@dataclass(frozen=True)
class ServePlan:
    """One resolved ``dynamo serve``.

    Attributes:
        runtime: Of the process that the command runs in.
        serve: What to run.
        supervisor: Limits and restarts.
        engine_args: Flags for the engine.
        http_port: Port of the frontend, chosen if any would do.
    """

    runtime: RuntimeSettings
    serve: ServeSettings
    supervisor: SupervisorSettings
    engine_args: tuple[str, ...]
    http_port: int

    @property
    def url(self) -> str:
        """URL of the frontend."""
        host = "127.0.0.1" if self.serve.http_host in ("0.0.0.0", "::") else self.serve.http_host
        return f"http://{host}:{self.http_port}"

    def worker_flags(self) -> list[str]:
        """Return the worker's own flags."""
        model = ["--model", self.serve.model] if self.serve.model else []
        return ["--engine", self.serve.engine, *model, *self.engine_args]

    def frontend_flags(self) -> list[str]:
        """Return the frontend's own flags."""
        serve = self.serve
        address = ["--http-host", serve.http_host, "--http-port", str(self.http_port)]
        policy = ["--policy", serve.policy] if serve.policy else []
        return [*address, "--router", serve.router, *policy]


def serve(argv: Sequence[str]) -> int:
    """Run ``dynamo serve``; return its exit status.

    Raises:
        ConfigurationError: for a wrong flag, a busy port, a missing model folder or package.
    """
    with ExitStack() as stack:
        plan = make_plan(argv, stack)
        screen = ServeScreen(plan.url, plan.serve, processes=not plan.serve.in_process)
        if plan.serve.in_process:
            return run_components(_in_process(plan), plan.runtime, on_ready=screen.show)
        specs = process_specs(plan)
        hosted = HostedComponent("supervisor", SupervisorPlugin(specs), (plan.supervisor,))
        return run_components([hosted], supervising_settings(plan.runtime, specs), on_ready=screen.show)


def make_plan(argv: Sequence[str], stack: ExitStack) -> ServePlan:
    """Resolve the command line and check early what can be checked early."""
    model, flags = ([argv[0]], argv[1:]) if argv and not argv[0].startswith("-") else ([], argv)
    resolved = resolve_settings(
        "dynamo serve",
        _KINDS,
        [*flags, *(["--model", *model] if model else [])],
        allow_extra_args=True,
        description="Serve a model on this machine. Flags that are not listed go to the engine.",
        defaults={"log_level": "warning"},
    )
    settings = resolved.get(ServeSettings)
    _refuse_misspelt(resolved.extra_args)
    _check_model(settings.model)
    for name in ("worker", "frontend", *(["planner"] if settings.planner else [])):
        if name not in plugins.available("components"):
            plugins.load("components", name)
    port = _free_port(settings.http_host, settings.http_port)
    runtime = _runtime_settings(resolved, settings, stack)
    return ServePlan(runtime, settings, resolved.get(SupervisorSettings), tuple(resolved.extra_args), port)


def process_specs(plan: ServePlan) -> list[ProcessSpec]:
    """Return the processes of a plan, in the order in which others depend on them."""
    shared = child_flags(plan.runtime)
    limit_s = plan.runtime.grace_period_s + plan.runtime.drain_timeout_s + STOP_MARGIN_S
    workers = component_command("worker", *shared, *plan.worker_flags())
    frontend = component_command("frontend", *shared, *plan.frontend_flags())
    specs = [
        ProcessSpec("worker", workers, plan.serve.workers, drain_timeout_s=limit_s),
        ProcessSpec("frontend", frontend, 1, drain_timeout_s=limit_s),
    ]
    if plan.serve.planner:
        planner = component_command("planner", *shared, "--role", "worker", "--target", "supervisor")
        specs.append(ProcessSpec("planner", planner, 1, drain_timeout_s=limit_s))
    return specs


def supervising_settings(runtime: RuntimeSettings, specs: Sequence[ProcessSpec]) -> RuntimeSettings:
    """Return settings with time for every role to drain in full, since they drain one after the other."""
    drain_timeout_s = sum(spec.drain_timeout_s for spec in specs)
    return runtime.model_copy(update={"drain_timeout_s": drain_timeout_s, "grace_period_s": 0.0})


def child_flags(runtime: RuntimeSettings) -> list[str]:
    """Return the runtime flags that make a child meet its supervisor's other children."""
    log_format = runtime.log_format
    if log_format == "auto":
        # A child's stderr is a pipe; what matters is where the supervisor's goes.
        log_format = "console" if sys.stderr.isatty() else "json"
    values = {
        "namespace": runtime.namespace,
        "discovery": runtime.discovery,
        "request-plane": runtime.request_plane,
        "event-bus": runtime.event_bus,
        "status-port": 0,
        "drain-timeout-s": runtime.drain_timeout_s,
        "grace-period-s": runtime.grace_period_s,
        "log-level": runtime.log_level,
        "log-format": log_format,
        "otlp-endpoint": runtime.otlp_endpoint,
        "trace-sample-ratio": runtime.trace_sample_ratio,
        "seed": runtime.seed,
    }
    flags = [part for name, value in values.items() if value != "" for part in (f"--{name}", str(value))]
    return [*flags, "--uvloop" if runtime.uvloop else "--no-uvloop"]


def _in_process(plan: ServePlan) -> list[HostedComponent]:
    workers = [
        _hosted(f"worker-{number}", "worker", plan.worker_flags()) for number in range(1, plan.serve.workers + 1)
    ]
    return [*workers, _hosted("frontend", "frontend", plan.frontend_flags())]


def _hosted(label: str, component: str, flags: list[str]) -> HostedComponent:
    plugin = plugins.load("components", component)
    resolved = resolve_settings(
        f"dynamo {component}", plugin.settings_types, flags, allow_extra_args=plugin.takes_extra_args
    )
    return HostedComponent(label, plugin, resolved.all(plugin.settings_types), resolved.extra_args)


def _runtime_settings(resolved: ResolvedSettings, settings: ServeSettings, stack: ExitStack) -> RuntimeSettings:
    """Fill in planes for what the caller left at its default: private ones, that end with the command."""
    runtime = resolved.get(RuntimeSettings)
    if settings.in_process:
        if settings.planner:
            raise ConfigurationError("option --planner scales processes; leave out --in-process to use it")
        planes = {"discovery": "mem://", "request_plane": "mem://", "event_bus": "mem://"}
    else:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-serve-")))
        planes = {
            "discovery": f"file://{folder}/discovery",
            "request_plane": f"unix://{folder}/sockets",
            "event_bus": "zmq://127.0.0.1:0",
        }
    chosen = {name: url for name, url in planes.items() if resolved.origins[name].source == "default"}
    if resolved.origins["status_port"].source == "default":
        chosen["status_port"] = "0"
    return RuntimeSettings.model_validate({**runtime.model_dump(), **chosen})


def _refuse_misspelt(extra: Sequence[str]) -> None:
    known = [f"--{name.replace('_', '-')}" for kind in _KINDS for name in kind.model_fields]
    for argument in extra:
        name = argument.split("=", maxsplit=1)[0]
        close = difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE_ENOUGH) if name.startswith("--") else []
        if close:
            raise ConfigurationError(f"flag {name!r} is not known to dynamo serve; did you mean {close[0]}?")
    if extra and not extra[0].startswith("-"):
        raise ConfigurationError(
            f"argument {extra[0]!r} is out of place; the model comes first: dynamo serve MODEL ..."
        )


def _check_model(model: str) -> None:
    looks_like_path = "/" in model or model.startswith((".", "~"))
    if looks_like_path and not Path(model).expanduser().exists():
        raise ConfigurationError(
            f"option --model has the value {model!r}: there is no such folder; give a model folder"
        )


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        ConfigurationError: if it cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            return probe.getsockname()[1]
    except OSError as error:
        raise ConfigurationError(
            f"option --http-port has the value {port}: {host}:{port} cannot be listened on "
            f"({error.strerror}); stop what uses it or give another port, 0 for any"
        ) from error
