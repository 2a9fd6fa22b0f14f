"""API keys in a file: secrets only as digests, written whole, read again when the file changes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Generator
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigurationError

PREFIX = "dyn"
MAX_KEYS = 100_000
_ID_BYTES = 6
_SECRET_BYTES = 32


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One key as the file holds it.

    Attributes:
        key_id: Public part; names the key in lists, logs and metrics.
        digest: SHA-256 of the secret part, in hex. The secret has 256 random bits, so nothing slower is needed.
        name: Whose it is, for people.
        tenant: Whose cached blocks it may share; the key's own if empty.
        requests_per_minute: Most requests of a minute; 0 for no limit.
        tokens_per_minute: Most prompt and output tokens of a minute; 0 for no limit.
        created_at_s: Unix time.
        revoked: Whether it is no longer taken.
    """

    key_id: str
    digest: str
    name: str = ""
    tenant: str = ""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    created_at_s: int = 0
    revoked: bool = False


class KeyTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole key file.

    Attributes:
        salt: Random text of this file; cache salts of tenants are made with it, so that nobody can guess them.
        keys: The keys.
        version: Version of this form.
    """

    salt: str
    keys: tuple[ApiKey, ...] = ()
    version: int = 1

    def cache_salt(self, key: ApiKey) -> str:
        """Return what separates a tenant's cached blocks from those of others."""
        tenant = (key.tenant or f"key:{key.key_id}").encode()
        return hashlib.blake2b(tenant, key=self.salt.encode()[:64], digest_size=12).hexdigest()


def new_key(**fields: str | int) -> tuple[str, ApiKey]:
    """Return a new key's text, which is shown once and never stored, and its record."""
    key_id = secrets.token_hex(_ID_BYTES)
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    record = msgspec.convert({"key_id": key_id, "digest": _digest(secret), **fields}, ApiKey)
    return f"{PREFIX}_{key_id}_{secret}", record


class KeyRing:
    """Finds the record of a key's text.

    Args:
        table: Keys to know.
    """

    def __init__(self, table: KeyTable) -> None:
        self.table = table
        self._by_id = {key.key_id: key for key in table.keys if not key.revoked}
        self._salts: dict[str, str] = {}

    def find(self, text: str) -> ApiKey | None:
        """Return the record of a valid key, else None. Takes as long whether the id or the secret is wrong."""
        prefix, _, rest = text.partition("_")
        key_id, _, secret = rest.partition("_")
        found = self._by_id.get(key_id) if prefix == PREFIX else None
        expected = found.digest if found is not None else _NOBODY
        return found if hmac.compare_digest(_digest(secret), expected) else None

    def cache_salt(self, key: ApiKey) -> str:
        """Return ``KeyTable.cache_salt``, worked out once a key."""
        salt = self._salts.get(key.key_id)
        if salt is None:
            salt = self._salts[key.key_id] = self.table.cache_salt(key)
        return salt


def read_keys(path: Path) -> KeyTable:
    """Read a key file.

    Raises:
        ConfigurationError: if it is missing or damaged, or holds too many keys.
    """
    try:
        table = msgspec.json.decode(path.read_bytes(), type=KeyTable)
    except OSError as error:
        raise ConfigurationError(
            f"api_keys_file {path} cannot be read: {error.strerror}; make it with: dynamo-frontend keys new",
            param="api_keys_file",
        ) from error
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"api_keys_file {path} is no key file: {error}", param="api_keys_file") from error
    if len(table.keys) > MAX_KEYS:
        raise ConfigurationError(
            f"api_keys_file {path} holds {len(table.keys)} keys; at most {MAX_KEYS} are taken", param="api_keys_file"
        )
    return table


@contextlib.contextmanager
def edited_keys(path: Path) -> Generator[list[ApiKey], None, None]:
    """Give the keys of a file to change, and write them whole at the end: readers see the old or the new file.

    Raises:
        ConfigurationError: as ``read_keys``, or if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}", param="file") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = read_keys(path) if path.exists() else KeyTable(secrets.token_hex(32))
        keys = list(table.keys)
        yield keys
        _write(path, msgspec.structs.replace(table, keys=tuple(keys)))
    finally:
        os.close(lock)


def _write(path: Path, table: KeyTable) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    data = msgspec.json.format(msgspec.json.encode(table), indent=2)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data + b"\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


_NOBODY = _digest(secrets.token_hex(_SECRET_BYTES))
