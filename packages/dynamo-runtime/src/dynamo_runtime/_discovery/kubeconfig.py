"""What a kubeconfig says of a context: server, namespace, and how to prove oneself."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, cast

import yaml

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._tls import is_pem

_FILES = {
    "tls_ca": "certificate-authority",
    "tls_cert": "client-certificate",
    "tls_key": "client-key",
}


def read_kubeconfig(path: Path, context: str = "") -> tuple[str, str, dict[str, str]]:
    """Return server, namespace and credentials of a context.

    Certificates that stand in the file itself are returned as PEM text.

    Raises:
        ConfigurationError: naming what is missing or unusable.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"kubeconfig {path} cannot be read: {error}", param="kubeconfig") from error
    config = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    name = context or str(config.get("current-context", ""))
    chosen = _named(path, config, "contexts", "context", name)
    cluster = _named(path, config, "clusters", "cluster", str(chosen.get("cluster", "")))
    user = _named(path, config, "users", "user", str(chosen["user"])) if chosen.get("user") else {}
    if not cluster.get("server"):
        raise ConfigurationError(f"kubeconfig {path} names no server for context {name!r}", param="kubeconfig")
    return str(cluster["server"]).rstrip("/"), str(chosen.get("namespace", "")), _credentials(path, {**cluster, **user})


def _named(path: Path, config: dict[str, Any], group: str, kind: str, name: str) -> dict[str, Any]:
    entries = cast("list[dict[str, Any]]", config.get(group) or [])
    for entry in entries:
        if entry.get("name") == name:
            return cast("dict[str, Any]", entry.get(kind) or {})
    known = ", ".join(str(entry.get("name")) for entry in entries) or "none"
    raise ConfigurationError(f"kubeconfig {path} has no {kind} {name!r}; it has {known}", param="context")


def _credentials(path: Path, entry: dict[str, Any]) -> dict[str, str]:
    if "exec" in entry or "auth-provider" in entry:
        raise ConfigurationError(
            f"kubeconfig {path} asks a program for its credentials; give the option token or token_file",
            param="kubeconfig",
        )
    given = {
        "token": str(entry.get("token", "")),
        "token_file": _beside(path, entry.get("tokenFile")),
        "tls_server_name": str(entry.get("tls-server-name", "")),
    }
    for option, name in _FILES.items():
        given[option] = _beside(path, entry.get(name)) or _pem(path, name, entry.get(f"{name}-data"))
    return {option: value for option, value in given.items() if value}


def _beside(path: Path, name: object) -> str:
    # A relative name counts from the file that holds it.
    return str(path.parent / str(name)) if name else ""


def _pem(path: Path, name: str, data: object) -> str:
    if not data:
        return ""
    try:
        text = base64.b64decode(str(data), validate=True).decode("ascii")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ConfigurationError(f"kubeconfig {path}: {name}-data is no base64: {error}", param="kubeconfig") from error
    if not is_pem(text):
        raise ConfigurationError(f"kubeconfig {path}: {name}-data holds no PEM", param="kubeconfig")
    return text
