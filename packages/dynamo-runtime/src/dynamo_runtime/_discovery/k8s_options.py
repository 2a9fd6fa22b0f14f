"""Options of discovery in Kubernetes, and how a URL, a kubeconfig or the cluster itself becomes them."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._discovery.kubeconfig import read_kubeconfig
from dynamo_runtime._options import checked_options, merged_options, require_above_zero
from dynamo_runtime._tls import TlsFiles

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_TIMES = (
    "startup_timeout_s",
    "request_timeout_s",
    "retry_interval_s",
    "max_retry_interval_s",
    "probe_interval_s",
    "reset_grace_s",
    "reap_interval_s",
)


class K8sOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times, credentials and trust of one client.

    Attributes:
        kubeconfig: File that says where the API server is and who asks; without it and without a host in the URL the
            pod's service account does.
        context: Context of the kubeconfig; its current one if empty.
        token: Bearer token; better given by ``token_file``, which no process list shows.
        token_file: File that holds the token; it is read again as it is rotated.
        tls: Whether to use TLS without naming any file, trusting the machine's authorities.
        tls_ca: Certificates of trusted authorities, PEM; given, TLS is used.
        tls_cert: Own certificate, PEM.
        tls_key: Key of ``tls_cert``.
        tls_server_name: Name the server's certificate must have, if it is not the one dialled.
        scope: Label value that keeps deployments in one namespace apart.
        service: Service whose EndpointSlices say which pods are ready; records of other pods are not shown. Empty
            shows all.
        pod_name: Pod of this process, for ``service``; in a cluster the variable ``POD_NAME`` says it.
        pod_uid: Identity of that pod, so that its lease goes with it; in a cluster ``POD_UID`` says it.
        startup_timeout_s: How long ``start`` tries to reach the server.
        request_timeout_s: Limit of one call.
        retry_interval_s: First pause between attempts to come back; doubles.
        max_retry_interval_s: Longest such pause.
        probe_interval_s: Silence after which the connection is tried.
        reset_grace_s: How long records stay in watches after a store came back without any of them.
        reap_interval_s: How often one of all clients looks for leases that have lapsed.
    """

    kubeconfig: str = ""
    context: str = ""
    token: str = ""
    token_file: str = ""
    tls: bool = False
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    scope: str = "dynamo"
    service: str = ""
    pod_name: str = ""
    pod_uid: str = ""
    startup_timeout_s: float = 120.0
    request_timeout_s: float = 10.0
    retry_interval_s: float = 0.1
    max_retry_interval_s: float = 5.0
    probe_interval_s: float = 10.0
    reset_grace_s: float = 15.0
    reap_interval_s: float = 5.0

    def __post_init__(self) -> None:
        require_above_zero(self, _TIMES)
        if not _LABEL.fullmatch(self.scope):
            raise ConfigurationError(
                f"scope {self.scope!r} is no label value; give letters, digits, dots and dashes", param="scope"
            )
        self.files.check()

    @property
    def files(self) -> TlsFiles:
        """The TLS files."""
        return TlsFiles(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)


class K8sTarget(msgspec.Struct, frozen=True):
    """What a ``k8s://`` URL says.

    Attributes:
        server: Base URL of the API server.
        namespace: Namespace that holds the objects.
        options: Everything else.
    """

    server: str
    namespace: str
    options: K8sOptions


def k8s_target(
    url: str, options: Mapping[str, object], environment: Mapping[str, str]
) -> tuple[K8sTarget, Metrics | None]:
    """Read ``k8s://[host[:port]]/[namespace][?option=value]``; ``options`` win over the query.

    Args:
        url: The URL. Without a host, the option ``kubeconfig`` or else the pod's service account says the rest.
        options: Options, ``metrics`` among them.
        environment: The process's environment variables.

    Raises:
        ConfigurationError: if an option is unknown or wrong, or this is no pod and nothing says where the server is.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "k8s" or parts.path.strip("/").count("/"):
        raise ConfigurationError(f"discovery {url!r} is not k8s://[host:port]/[namespace]")
    fields, metrics = merged_options(url, options)
    server, namespace, found = "", "", dict[str, str]()
    if not parts.netloc:
        server, namespace, found = _place(
            str(fields.get("kubeconfig", "")), str(fields.get("context", "")), environment
        )
    pod = {"pod_name": environment.get("POD_NAME", ""), "pod_uid": environment.get("POD_UID", "")}
    parsed = checked_options(K8sOptions, {**pod, **found, **fields}, f"discovery {url}")
    scheme = "https" if parsed.tls or parsed.files.on else "http"
    namespace = parts.path.strip("/") or namespace or "default"
    return K8sTarget(server or f"{scheme}://{parts.netloc}", namespace, parsed), metrics


def _place(kubeconfig: str, context: str, environment: Mapping[str, str]) -> tuple[str, str, dict[str, str]]:
    if kubeconfig:
        return read_kubeconfig(Path(kubeconfig), context)
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not SERVICE_ACCOUNT.is_dir():
        raise ConfigurationError(
            "discovery k8s:// names no server, and this is no pod with a service account; "
            "give k8s://host:port/namespace or the option kubeconfig"
        )
    files = {"token_file": str(SERVICE_ACCOUNT / "token"), "tls_ca": str(SERVICE_ACCOUNT / "ca.crt")}
    host = f"[{host}]" if ":" in host else host
    return f"https://{host}:{port}", (SERVICE_ACCOUNT / "namespace").read_text().strip(), files
