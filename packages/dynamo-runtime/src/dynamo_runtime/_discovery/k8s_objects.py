"""How records stand in Kubernetes: a ConfigMap each, found by its labels."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from dynamo_core.discovery import Record
from dynamo_core.errors import BackendProtocolError

SCOPE, KIND, LEASE, ROLE = "dynamo-scope", "dynamo-kind", "dynamo-lease", "dynamo-role"
KEY, POD, WRITE = "dynamo-key", "dynamo-pod", "dynamo-write"
RECORD_ROLE, LEASE_ROLE = "record", "lease"
_VALUE = "value"
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,63}")


class Owner(msgspec.Struct, frozen=True):
    """The lease that a record is under, and the pod of its process.

    Attributes:
        lease_id: Identity.
        lease_uid: Identity of the lease's object, so that Kubernetes deletes the record with it.
        pod: Name of the pod; empty if it is not known.
    """

    lease_id: int
    lease_uid: str
    pod: str = ""


class Seen(msgspec.Struct, frozen=True):
    """A record as it was found, and the pod of its owner."""

    record: Record
    pod: str


def record_name(scope: str, key: str) -> str:
    """Return the name of a record's object; a key may hold what a name may not."""
    return f"dynamo-{hashlib.blake2b(f'{scope}/{key}'.encode(), digest_size=20).hexdigest()}"


def lease_name(lease_id: int) -> str:
    """Return the name of a lease's object."""
    return f"dynamo-{lease_id:x}"


def selector(scope: str, prefix: str = "") -> str:
    """Return the labels of the records under a prefix; some others may have them too."""
    kind = _kind(prefix)
    labels = {SCOPE: scope, ROLE: RECORD_ROLE, **({KIND: kind} if kind else {})}
    return ",".join(f"{name}={value}" for name, value in labels.items())


def record_object(
    scope: str, key: str, value: bytes, owner: Owner | None, version: int | None = None
) -> dict[str, Any]:
    """Return the object of a record, to replace that of a version if one is given."""
    labels = {SCOPE: scope, ROLE: RECORD_ROLE, KIND: _kind(key) or "other"}
    # A write that changes nothing would leave the version as it is; this makes each one a change.
    annotations = {KEY: key, WRITE: secrets.token_hex(8)}
    metadata: dict[str, Any] = {"name": record_name(scope, key), "labels": labels, "annotations": annotations}
    if owner is not None:
        labels[LEASE] = f"{owner.lease_id:x}"
        if owner.pod:
            annotations[POD] = owner.pod
        metadata["ownerReferences"] = [reference("coordination.k8s.io/v1", "Lease", owner)]
    if version is not None:
        metadata["resourceVersion"] = str(version)
    data = {_VALUE: base64.b64encode(value).decode("ascii")}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "binaryData": data}


def reference(api_version: str, kind: str, owner: Owner) -> dict[str, Any]:
    """Return the reference by which Kubernetes deletes an object with its owner."""
    return {"apiVersion": api_version, "kind": kind, "name": lease_name(owner.lease_id), "uid": owner.lease_uid}


def seen(found: Mapping[str, Any]) -> Seen:
    """Return the record of an object.

    Raises:
        BackendProtocolError: if it is none.
    """
    try:
        metadata = found["metadata"]
        annotations = metadata["annotations"]
        value = base64.b64decode((found.get("binaryData") or {}).get(_VALUE, ""))
        return Seen(Record(str(annotations[KEY]), value, version(found)), str(annotations.get(POD, "")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackendProtocolError(f"a ConfigMap of ours holds no record: {error!r}; delete it") from error


def version(found: Mapping[str, Any]) -> int:
    """Return an object's version, by which Kubernetes orders all changes of a kind."""
    return int(found["metadata"]["resourceVersion"])


def _kind(key: str) -> str:
    """Return the label value for the first two segments of a key; empty if there are no two whole ones."""
    first, _, rest = key.partition("/")
    second, slash, _ = rest.partition("/")
    kind = f"{first}.{second}"
    return (
        kind if slash and second and _LABEL.fullmatch(kind) and kind[0] not in "_.-" and kind[-1] not in "_.-" else ""
    )
