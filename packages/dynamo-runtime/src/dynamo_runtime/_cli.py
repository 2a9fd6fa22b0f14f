"""The ``dynamo`` command: runs components, whole stacks, and looks into running ones."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError, DynamoError

KNOWN_COMPONENTS = ("frontend", "planner", "router", "worker")
DISTRIBUTIONS = ("core", "runtime", "frontend", "router", "worker", "kvbm", "planner")
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit status: 0 done, 1 failed, 2 asked for wrongly."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except DynamoError as error:
        from dynamo_runtime._host import report_failure

        return report_failure(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())  # noqa: T201 - the output of --help
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(_versions())  # noqa: T201 - the output of --version
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in COMMANDS:
        return COMMANDS[name][1](rest)
    commands = plugins.available("commands")
    if name in commands:
        return int(plugins.load("commands", name)(rest))
    installed = plugins.available("components")
    if name in installed or name in KNOWN_COMPONENTS:
        return run_component(name, rest)
    raise ConfigurationError(_unknown(name, [*COMMANDS, *commands, *installed, *KNOWN_COMPONENTS]))


def run_component(name: str, argv: Sequence[str]) -> int:
    """Run one component of group ``components`` in this process.

    Raises:
        ConfigurationError: if it is not installed, or its flags are wrong.
    """
    plugin = plugins.load("components", name)

    from dynamo_core.settings import resolve_settings
    from dynamo_runtime._host import HostedComponent, run_components
    from dynamo_runtime._settings import RuntimeSettings

    resolved = resolve_settings(
        f"dynamo {name}",
        (RuntimeSettings, *plugin.settings_types),
        argv,
        allow_extra_args=plugin.takes_extra_args,
        description=f"Run the {name}.",
    )
    hosted = HostedComponent(name, plugin, resolved.all(plugin.settings_types), resolved.extra_args)
    return run_components([hosted], resolved.get(RuntimeSettings))


def _serve(argv: list[str]) -> int:
    from dynamo_runtime._serve import serve

    return serve(argv)


def _up(argv: list[str]) -> int:
    from dynamo_runtime._up import up

    return up(argv)


def _render(argv: list[str]) -> int:
    from dynamo_runtime._up import render

    return render(argv)


def _instances(argv: list[str]) -> int:
    from dynamo_runtime._operate import instances

    return instances(argv)


def _watch(argv: list[str]) -> int:
    from dynamo_runtime._operate import watch

    return watch(argv)


def _call(argv: list[str]) -> int:
    from dynamo_runtime._operate import call

    return call(argv)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "serve": ("[MODEL]            serve a model on this machine: frontend and workers, no configuration", _serve),
    "up": ("GRAPH.YAML         run a deployment graph on this machine", _up),
    "render": ("k8s GRAPH.YAML     print the graph as Kubernetes manifests, or `schema` as JSON schema", _render),
    "instances": ("                   list who serves what", _instances),
    "watch": ("                   follow changes of discovery", _watch),
    "call": ("ENDPOINT JSON      call an endpoint and print what it answers", _call),
}


def _usage() -> str:
    installed = plugins.available("components")
    lines = ["usage: dynamo COMMAND [options]; dynamo COMMAND --help shows the options", ""]
    lines += [f"  dynamo {name:<10} {text}" for name, (text, _) in COMMANDS.items()]
    lines += [f"  dynamo {name:<10} {entry.dist.name if entry.dist else ''}" for name, entry in _plugged_in()]
    lines += ["", "components, one process each:"]
    for name in sorted({*installed, *KNOWN_COMPONENTS}):
        state = "" if name in installed else f"not installed: pip install dynamo-{name}"
        lines.append(f"  dynamo {name:<10} {state}".rstrip())
    return "\n".join([*lines, "", "  dynamo --version"])


def _plugged_in() -> list[tuple[str, metadata.EntryPoint]]:
    """Commands that other distributions bring."""
    return sorted(plugins.available("commands").items())


def _versions() -> str:
    found: list[str] = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"dynamo-{name} {metadata.version(f'dynamo-{name}')}")
        except metadata.PackageNotFoundError:
            continue
    return "\n".join(found)


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "see dynamo --help"
    return f"command {name!r} is not one of {', '.join(sorted(set(known)))}; {hint}"
