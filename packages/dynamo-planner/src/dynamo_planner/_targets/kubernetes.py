"""Scales Kubernetes workloads, through kubernetes-asyncio (extra ``kubernetes``), the only file that imports it.

A role is the scale subresource of a Deployment or StatefulSet, or a service of a DynamoGraphDeployment. What is desired
comes from there at each look, what is true from the pods, which are watched. Every write carries the version that was
read, so two writers never undo each other unseen: the one that lost reads again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import msgspec
import structlog

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.errors import (
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from dynamo_core.planning import PoolState, ScalingTarget
from dynamo_planner._targets.pod_watch import LibraryPods, PodWatch
from dynamo_planner._targets.pods import pool_of

WRITES_TRIED = 4
GRAPH = ("nvidia.com", "v1alpha1")
GRAPHS = "dynamographdeployments"
GRAPH_LABEL = "nvidia.com/dynamo-graph-deployment-name"
SERVICE_LABEL = "nvidia.com/dynamo-component"
TOKEN_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class KubernetesOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``--target-options`` says.

    Attributes:
        roles: Role to ``deployment/NAME``, ``statefulset/NAME`` or ``service/NAME`` of the graph.
        namespace: Namespace of all of them.
        graph: Name of the DynamoGraphDeployment; without ``roles`` its services are found by ``subComponentType``.
        api_url: Address of the API server; from the pod's account or the kubeconfig if empty.
        kubeconfig: Kubeconfig file; the usual one if empty.
        timeout_s: Limit of one call.
        watch_s: Seconds after which a watch of the pods is opened anew.
        resync_s: Seconds after which the pods are listed anew although they are watched.
    """

    roles: dict[str, str] = {}
    namespace: str = "default"
    graph: str = ""
    api_url: str = ""
    kubeconfig: str = ""
    timeout_s: float = 10.0
    watch_s: float = 300.0
    resync_s: float = 600.0


class ScaleHandle(Protocol):
    """Where the replicas of one role are read and written."""

    async def read(self) -> Scale:
        """Return what is asked for."""
        ...

    async def write(self, replicas: int, version: str) -> None:
        """Ask for replicas, unless the object is no longer of this version."""
        ...


@dataclass(frozen=True)
class Scale:
    """What is asked for.

    Attributes:
        replicas: Replicas.
        selector: Label selector of their pods.
        version: Version of the object.
    """

    replicas: int
    selector: str
    version: str


class KubernetesTarget:
    """Scales workloads of one namespace.

    Args:
        options: Where they are.
        clock: Time.
    """

    def __init__(self, options: KubernetesOptions, clock: Clock | None = None) -> None:
        self._options = options
        self._clock = SystemClock() if clock is None else clock
        self._library: Any = None
        self._client: Any = None
        self._handles: dict[str, ScaleHandle] = {}
        self._watches: dict[str, PodWatch] = {}
        self._pods: LibraryPods | None = None
        self._warned: dict[str, str] = {}
        self._last_decision = 0

    async def start(self) -> None:
        """Connect, and find the services of a graph.

        Raises:
            ConfigurationError: if the extra or the credentials are missing, or the graph names no role.
            NotFoundError: if the graph does not exist.
            PermissionDeniedError: if the account may not read it.
            UnavailableError: if the API server cannot be reached.
        """
        self._library = _library()
        self._client = await _connected(self._library, self._options)
        self._pods = LibraryPods(
            self._library.client.CoreV1Api(self._client),
            self._options.namespace,
            self._called,
            _translated,
            timeout_s=self._options.timeout_s,
            watch_s=self._options.watch_s,
        )
        try:
            roles = self._options.roles or await self._graph_roles()
            self._handles = {role: self._handle(role, place) for role, place in roles.items()}
        except BaseException:
            await self.close()
            raise

    async def state(self) -> Mapping[str, PoolState]:
        """Return the pools, with pending and failing pods as they are.

        Raises:
            UnavailableError: if the API server cannot be reached.
            PermissionDeniedError: if the account may not read the scale or the pods.
            NotFoundError: if a workload is gone.
        """
        pools: dict[str, PoolState] = {}
        for role, handle in self._handles.items():
            scale = await self._called(f"scale of {role}", handle.read)
            watch = await self._watch(role, scale.selector)
            pools[role], trouble = pool_of(await watch.pods(), scale.replicas)
            self._warn(role, trouble)
        return pools

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        """Write the counts that differ.

        Raises:
            NotFoundError: for an unknown role or a workload that is gone.
            InvalidRequestError: for a count below 0, or one that the API server refuses.
            ConflictError: if another writer was faster several times in a row.
            PermissionDeniedError: if the account may not scale.
            UnavailableError: if the API server cannot be reached.
        """
        for role, count in replicas.items():
            if role not in self._handles:
                raise NotFoundError(f"Kubernetes target has no role {role!r}; it has {sorted(self._handles)}")
            if count < 0:
                raise InvalidRequestError(f"{count} replicas of {role!r} asked for; give at least 0", param=role)
        if decision_id and decision_id <= self._last_decision:
            return
        for role, count in replicas.items():
            await self._written(role, count)
        self._last_decision = max(self._last_decision, decision_id)

    async def close(self) -> None:
        """Disconnect; pods stay. Idempotent."""
        for watch in self._watches.values():
            await watch.close()
        self._watches.clear()
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _watch(self, role: str, selector: str) -> PodWatch:
        known = self._watches.get(role)
        if known is None or known.selector != selector:
            if known is not None:
                await known.close()
            assert self._pods is not None
            known = self._watches[role] = PodWatch(self._pods, selector, self._clock, self._options.resync_s)
        return known

    async def _written(self, role: str, count: int) -> None:
        handle = self._handles[role]
        for _ in range(WRITES_TRIED):
            scale = await self._called(f"scale of {role}", handle.read)
            if scale.replicas == count:
                return
            try:
                version = scale.version
                await self._called(f"scale of {role}", lambda version=version: handle.write(count, version))
            except ConflictError:
                continue
            return
        raise ConflictError(
            f"{role!r} was changed by someone else {WRITES_TRIED} times in a row; trying at the next tick"
        )

    async def _called(self, what: str, call: Callable[[], Awaitable[_T]]) -> _T:
        try:
            return await call()
        except self._library.client.ApiException as error:
            raise _translated(what, int(error.status or 0), str(error.reason)) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(f"Kubernetes API server cannot be reached for {what}: {error!r}") from error

    def _handle(self, role: str, place: str) -> ScaleHandle:
        kind, _, name = place.partition("/")
        limits = {"_request_timeout": self._options.timeout_s}
        if kind == "service" and name and self._options.graph:
            api = self._library.client.CustomObjectsApi(self._client)
            return _GraphService(api, self._options.namespace, self._options.graph, name, limits)
        if kind in ("deployment", "statefulset") and name:
            return _ScaleSubresource(
                self._library.client.AppsV1Api(self._client), kind, name, self._options.namespace, limits
            )
        raise ConfigurationError(
            f"role {role!r} of target 'kubernetes' is {place!r}; give deployment/NAME, statefulset/NAME, or, with "
            "graph, service/NAME"
        )

    async def _graph_roles(self) -> dict[str, str]:
        api = self._library.client.CustomObjectsApi(self._client)
        name = self._options.graph
        found = await self._called(
            f"graph {name}",
            lambda: api.get_namespaced_custom_object(
                *GRAPH, self._options.namespace, GRAPHS, name, _request_timeout=self._options.timeout_s
            ),
        )
        roles: dict[str, str] = {}
        for service, spec in found["spec"].get("services", {}).items():
            kind = spec.get("subComponentType") or ("worker" if spec.get("componentType") == "worker" else "")
            if kind in roles:
                raise ConfigurationError(f"graph {name!r} has two services of type {kind!r}; name one in roles")
            if kind in ("prefill", "decode", "worker"):
                roles[kind] = f"service/{service}"
        if not roles:
            raise ConfigurationError(f"graph {name!r} has no service with a subComponentType; name them in roles")
        return roles

    def _warn(self, role: str, trouble: str) -> None:
        """Log what keeps pods from getting ready, once until it changes."""
        if trouble and self._warned.get(role) != trouble:
            _log.warning("pods do not get ready", role=role, trouble=trouble)
        self._warned[role] = trouble


@dataclass(frozen=True)
class _ScaleSubresource:
    api: Any
    kind: str
    name: str
    namespace: str
    limits: Mapping[str, Any]

    async def read(self) -> Scale:
        call = getattr(self.api, f"read_namespaced_{_METHODS[self.kind]}_scale")
        found = await call(self.name, self.namespace, **self.limits)
        selector = found.status.selector if found.status is not None else ""
        return Scale(found.spec.replicas or 0, selector or "", found.metadata.resource_version)

    async def write(self, replicas: int, version: str) -> None:
        call = getattr(self.api, f"patch_namespaced_{_METHODS[self.kind]}_scale")
        body = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
        await call(self.name, self.namespace, body, _content_type=_MERGE, **self.limits)


@dataclass(frozen=True)
class _GraphService:
    api: Any
    namespace: str
    graph: str
    service: str
    limits: Mapping[str, Any]

    async def read(self) -> Scale:
        found = await self.api.get_namespaced_custom_object(*GRAPH, self.namespace, GRAPHS, self.graph, **self.limits)
        services = found["spec"].get("services", {})
        if self.service not in services:
            raise NotFoundError(f"graph {self.graph!r} has no service {self.service!r}; it has {sorted(services)}")
        replicas = services[self.service].get("replicas", 1)
        selector = f"{GRAPH_LABEL}={self.graph},{SERVICE_LABEL}={self.service}"
        return Scale(int(replicas), selector, found["metadata"]["resourceVersion"])

    async def write(self, replicas: int, version: str) -> None:
        spec = {"services": {self.service: {"replicas": replicas}}}
        body = {"metadata": {"resourceVersion": version}, "spec": spec}
        await self.api.patch_namespaced_custom_object(
            *GRAPH, self.namespace, GRAPHS, self.graph, body, _content_type=_MERGE, **self.limits
        )


_METHODS = {"deployment": "deployment", "statefulset": "stateful_set"}
_MERGE = "application/merge-patch+json"


def _translated(what: str, status: int, reason: str) -> Exception:
    if status == 403:
        return PermissionDeniedError(
            f"the planner's account may not use the {what}; allow get and patch on it, and list and watch on pods"
        )
    if status == 401:
        return PermissionDeniedError(f"the API server does not know the planner's account ({what}); renew its token")
    if status == 404:
        return NotFoundError(f"Kubernetes has no {what}; check namespace and names in --target-options")
    if status == 409:
        return ConflictError(f"the {what} was changed by someone else")
    if 400 <= status < 500 and status != 429:
        return InvalidRequestError(f"the API server refuses the {what}: {status} {reason}")
    return UnavailableError(f"the API server failed on the {what}: {status} {reason}")


def _in_cluster() -> bool:
    return TOKEN_FILE.is_file()


async def _connected(library: Any, options: KubernetesOptions) -> Any:
    configuration = library.client.Configuration(host=options.api_url or None)
    if options.api_url:
        return library.client.ApiClient(configuration)
    try:
        if not options.kubeconfig and _in_cluster():
            library.config.load_incluster_config(client_configuration=configuration)
            return library.client.ApiClient(configuration)
        # The library writes certificates and keys of a kubeconfig to files; the client has read them once it is made.
        with tempfile.TemporaryDirectory(prefix="dynamo-planner-") as folder:
            await library.config.load_kube_config(
                config_file=options.kubeconfig or None, client_configuration=configuration, temp_file_path=folder
            )
            try:
                return library.client.ApiClient(configuration)
            finally:
                library.forget_files()
    except (library.config.ConfigException, OSError) as error:
        raise ConfigurationError(f"no Kubernetes credentials: {error}; give kubeconfig or api_url") from error


@dataclass(frozen=True)
class _Library:
    client: Any
    config: Any
    forget_files: Callable[[], None]
    """Makes the library forget the files it wrote, which it would use again for the same kubeconfig."""


def _library() -> _Library:
    try:
        from kubernetes_asyncio import client, config
        from kubernetes_asyncio.config import kube_config
    except ImportError as error:
        raise ConfigurationError(
            "target 'kubernetes' needs kubernetes-asyncio; install it with: pip install 'dynamo-planner[kubernetes]'"
        ) from error
    return _Library(client, config, getattr(kube_config, "_cleanup_temp_files", lambda: None))


def create_kubernetes_target(context: ComponentContext, options: Mapping[str, Any]) -> ScalingTarget:
    """Return the target that ``--target-options`` describes, see ``KubernetesOptions``.

    Raises:
        ConfigurationError: if an option is unknown or of another type, or neither roles nor graph are given.
    """
    try:
        wanted = msgspec.convert(dict(options), KubernetesOptions)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"options of target 'kubernetes' are wrong: {error}") from error
    if not wanted.roles and not wanted.graph:
        raise ConfigurationError(
            "target 'kubernetes' needs roles or graph; give for example "
            '{"roles": {"worker": "deployment/vllm"}, "namespace": "serving"}'
        )
    return KubernetesTarget(wanted, context.clock)
