"""Deployment graphs: services, replicas and roles in one YAML file that runs here or renders for a cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dynamo_core.errors import ConfigurationError

_NAME = r"^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$"
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
Scalar = str | int | float | bool


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(_Strict):
    """What one replica needs. Locally only ``gpu`` is enforced; ``cpu`` and ``memory`` are for Kubernetes."""

    cpu: str = Field(default="", description="CPU cores, as Kubernetes writes them: 2 or 500m")
    memory: str = Field(default="", description="Memory, as Kubernetes writes it: 2Gi")
    gpu: int = Field(default=0, ge=0, le=64, description="GPU devices")

    @field_validator("cpu", "memory", mode="before")
    @classmethod
    def _is_quantity(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if isinstance(text, str) and text and not re.match(_QUANTITY, text):
            raise ValueError("is no quantity; write for example 2, 500m or 2Gi")
        return text


class Service(_Strict):
    """One service: replicas of one component."""

    component: str = Field(min_length=1, description="Component plug-in: frontend, worker, router, planner")
    replicas: int = Field(default=1, ge=0, le=4096, description="Replicas to start with")
    role: str = Field(default="", description="Name by which a planner scales it; the service's own if empty")
    args: dict[str, Scalar | list[Scalar]] | list[Scalar] = Field(
        default_factory=list[Scalar], description="Flags of the component: a list, or names to values"
    )
    env: dict[str, str | int | float] = Field(
        default_factory=dict[str, str | int | float], description="Environment variables"
    )
    resources: Resources = Field(default_factory=Resources, description="What one replica needs")
    port: int = Field(default=0, ge=0, le=65535, description="Port it listens on for clients; for Kubernetes")
    image: str = Field(default="", description="Container image; the graph's own if empty; for Kubernetes")

    def flags(self) -> list[str]:
        """Return ``args`` as a command line."""
        if isinstance(self.args, list):
            return [str(item) for item in self.args]
        return [part for name, value in self.args.items() for part in _flag(name, value)]

    def environment(self) -> dict[str, str]:
        """Return ``env`` as text."""
        return {name: str(value) for name, value in self.env.items()}


class Graph(_Strict):
    """A deployment: services that find each other on the same planes."""

    namespace: str = Field(default="dynamo", pattern=_NAME, description="Namespace of the deployment")
    discovery: str = Field(default="", description="Discovery plane; locally a private file store if empty")
    request_plane: str = Field(default="", description="Request plane; chosen for the place if empty")
    event_bus: str = Field(default="", description="Event bus; chosen for the place if empty")
    image: str = Field(default="", description="Container image of all services; for Kubernetes")
    services: dict[str, Service] = Field(min_length=1, description="Services by name")

    @field_validator("services")
    @classmethod
    def _names_are_labels(cls, value: dict[str, Service]) -> dict[str, Service]:
        for name in value:
            if not re.match(_NAME, name):
                raise ValueError(f"service name {name!r} must be lower-case letters, digits and dashes")
        return value

    @model_validator(mode="after")
    def _roles_differ(self) -> Self:
        roles = [self.role_of(name) for name in self.services]
        twice = next((role for role in roles if roles.count(role) > 1), None)
        if twice is not None:
            raise ValueError(f"role {twice!r} is used by two services; give each its own")
        return self

    def role_of(self, service: str) -> str:
        """Return the role of a service."""
        return self.services[service].role or service


class GraphFile:
    """A graph with the lines it was read from, so that every complaint can name one."""

    def __init__(self, path: Path, root: yaml.Node | None, graph: Graph) -> None:
        self.graph = graph
        self._path = path
        self._root = root

    @classmethod
    def read(cls, path: Path) -> GraphFile:
        """Read and check a file.

        Raises:
            ConfigurationError: naming file, line, field and remedy.
        """
        text = _read_text(path)
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            loaded = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else 1
            raise ConfigurationError(f"{path}:{line}: not YAML: {getattr(error, 'problem', error)}") from error
        _refuse_duplicates(path, root)
        if not isinstance(loaded, dict):
            raise ConfigurationError(f"{path}:1: a graph is a mapping with the key services")
        try:
            return cls(path, root, Graph.model_validate(loaded))
        except ValidationError as error:
            raise ConfigurationError(_explain(path, root, error)) from error

    def complain(self, location: Sequence[str], message: str) -> ConfigurationError:
        """Return an error about a place in the file."""
        return ConfigurationError(f"{self._path}:{_line_of(self._root, location)}: {'.'.join(location)}: {message}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"graph {path}: {error.strerror}; give a readable YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"graph {path} is not UTF-8 text: {error.reason}") from error


def _flag(name: str, value: Scalar | list[Scalar]) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, list):
        return [part for item in value for part in (flag, str(item))]
    return [flag, str(value)]


def _explain(path: Path, root: yaml.Node | None, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key; known are {', '.join(_known_keys(location[:-1]))}"
    elif first["type"] == "missing":
        message = "is required"
    elif not isinstance(first["input"], dict | list):
        message = f"{message}, not {first['input']!r}"
    where = ".".join(location)
    return f"{path}:{_line_of(root, location)}: {where + ': ' if where else ''}{message}"


def _known_keys(location: Sequence[str]) -> list[str]:
    kinds: dict[int, type[BaseModel]] = {0: Graph, 2: Service, 3: Resources}
    return list(kinds.get(len(location), Graph).model_fields)


def _line_of(root: yaml.Node | None, location: Sequence[str]) -> int:
    """Return the line of the deepest part of a location that the file has."""
    node, line = root, 1
    for part in location:
        found = _step(node, part)
        if found is None:
            continue
        node, line = found
    return line


def _step(node: yaml.Node | None, part: str) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return value, key.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
        item = node.value[int(part)]
        return item, item.start_mark.line + 1
    return None


def _refuse_duplicates(path: Path, node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(path, item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise ConfigurationError(f"{path}:{key.start_mark.line + 1}: key {key.value!r} is given twice; keep one")
        seen.add(key.value)
        _refuse_duplicates(path, value)
