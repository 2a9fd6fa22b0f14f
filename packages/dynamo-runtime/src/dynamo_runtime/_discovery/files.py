"""The directory behind file discovery: records, revisions, leases. Blocking calls, for one thread at a time.

Layout::

    <root>/<percent-encoded key>     a record: key, revision, lease, value, checksum
    <root>/.state/lock               held with flock over every change
    <root>/.state/revision           the newest revision given out
    <root>/.state/leases/<hex id>    a lease; its modification time is its heartbeat
    <root>/.state/tmp/               records being written

Only records lie in the root, so that heartbeats do not wake those who watch it. A record appears by rename or hard
link, whole or not at all. Nothing is synced to disk: after a machine's crash no lease is alive, and a record that was
half written by then fails its checksum and counts as absent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import secrets
import stat
import zlib
from collections.abc import Generator
from pathlib import Path

import msgspec

from dynamo_core.discovery import Record, quote_segment
from dynamo_core.errors import ConflictError, InvalidRequestError, PayloadTooLargeError
from dynamo_runtime._discovery.owner import Owner

MAX_FILE_NAME_BYTES = 255
MAX_RECORD_BYTES = 16 << 20
"""Largest file of a record; of a larger one no more is read."""

FORMAT = "dynamo-file-discovery-1"
_LOST_COUNTER_LEAP = 1_000_000
_COUNTER_DIGITS = 20
_MAX_REVISION = 1 << 62
"""Beyond it nobody has counted: a file that says more is damaged, and a modification time could not hold it."""

_SCAN_ATTEMPTS = 3
_HEAD_BYTES = 128
"""What a record's file holds beside key and value, at most."""


class StoreBusyError(Exception):
    """Another process holds the lock."""


class StoredRecord(msgspec.Struct, frozen=True, array_like=True):
    """A record file's content."""

    format: str
    key: str
    revision: int
    lease_id: int
    value: bytes
    checksum: int


class LeaseFile(msgspec.Struct, frozen=True, array_like=True):
    """A lease file's content: how long it lives without a heartbeat, and whose it is."""

    ttl_s: float
    owner: Owner


class LeaseSeen(msgspec.Struct, frozen=True):
    """A lease as one look found it; ``heartbeat`` only ever compares equal or not."""

    lease_id: int
    heartbeat: tuple[int, int]
    lease: LeaseFile | None


class View(msgspec.Struct, frozen=True):
    """All records as one scan found them.

    Attributes:
        records: By key.
        revision: Newest revision given out before the scan.
        garbled: Files that could not be read as records.
        whole: False if writes were under way all the time, so that the newest ones are left for the next scan.
    """

    records: dict[str, Record]
    revision: int
    garbled: int
    whole: bool = True


UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding bytes of any kind may raise."""

_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(StoredRecord).decode
_decode_lease = msgspec.msgpack.Decoder(LeaseFile).decode


class FileStore:
    """A directory of records.

    Args:
        root: The directory; made with mode 0700 if it is not there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._state = root / ".state"
        self._leases = self._state / "leases"
        self._tmp = self._state / "tmp"
        # Revisions must grow even if the counter's file is lost with its directory.
        self._floor = 0
        self._records: dict[str, Record] = {}
        self._cache: dict[str, tuple[tuple[int, int, int], StoredRecord | None]] = {}

    def prepare(self) -> None:
        """Make what is missing of the layout."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._state, self._leases, self._tmp):
            folder.mkdir(mode=0o700, exist_ok=True)

    # Records.

    def put(self, key: str, value: bytes, lease_id: int) -> Record:
        """Write a record.

        Raises:
            ConflictError: if the lease is gone.
            StoreBusyError: if another process holds the lock.
        """
        with self._locked():
            return self._write(key, value, lease_id)

    def compare_and_set(self, key: str, value: bytes, expected: int | None, lease_id: int) -> Record | None:
        """Write a record if its revision is ``expected``, or if it is absent with None; None if it is not so."""
        with self._locked():
            present = self._read(file_name(key))
            if (present.revision if present else None) != expected:
                return None
            return self._write(key, value, lease_id, create=present is None)

    def delete(self, key: str) -> int | None:
        """Delete a record and return the revision of that, or None if there was none."""
        with self._locked():
            name = file_name(key)
            there = self._read(name) is not None
            with contextlib.suppress(FileNotFoundError):
                (self.root / name).unlink()
            return self._next_revision() if there else None

    def get(self, key: str) -> Record | None:
        """Return a record; one that cannot be read counts as absent."""
        stored = self._read(file_name(key))
        return Record(stored.key, stored.value, stored.revision) if stored else None

    def scan(self) -> View:
        """Return all records. Only files that changed since the last scan are read.

        A record that cannot be read any more keeps its last value: damage to a file is no deletion.
        """
        for _ in range(_SCAN_ATTEMPTS - 1):
            newest = self._revision()
            records, garbled = self._scan_once()
            if self._revision() == newest:
                return self._seen(records, garbled, whole=True)
        # Others write all the time. A write during the scan may be missed while a later one is seen, so everything
        # from the first that may be under way is left for the next scan.
        limit = max(self._revision() - 1, self._floor)
        records, garbled = self._scan_once()
        return self._seen(self._up_to(limit, records), garbled, whole=False)

    def _seen(self, records: dict[str, Record], garbled: int, *, whole: bool) -> View:
        self._records = records
        self._floor = max(self._floor, max((record.revision for record in records.values()), default=0))
        return View(records, self._floor, garbled, whole)

    def _scan_once(self) -> tuple[dict[str, Record], int]:
        cache: dict[str, tuple[tuple[int, int, int], StoredRecord | None]] = {}
        with os.scandir(self.root) as entries:
            for entry in entries:
                found = None if entry.name.startswith(".") else self._look(entry)
                if found is not None:
                    cache[entry.name] = found
        self._cache = cache
        stored = [item for _, item in cache.values() if item is not None]
        records = {item.key: Record(item.key, item.value, item.revision) for item in stored}
        return records, len(cache) - len(stored)

    def _up_to(self, limit: int, records: dict[str, Record]) -> dict[str, Record]:
        shown: dict[str, Record] = {}
        for key, record in records.items():
            older = record if record.revision <= limit else self._records.get(key)
            if older is not None:
                shown[key] = older
        return shown

    def _look(self, entry: os.DirEntry[str]) -> tuple[tuple[int, int, int], StoredRecord | None] | None:
        try:
            info = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(info.st_mode):
            return None
        mark = _mark(info)
        known = self._cache.get(entry.name)
        if known is not None and known[0] == mark:
            return known
        stored = self._read(entry.name)
        if stored is None and known is not None:
            stored = known[1]
        return mark, stored

    def _write(self, key: str, value: bytes, lease_id: int, *, create: bool = False) -> Record:
        name = file_name(key)
        if lease_id and not self._lease_path(lease_id).exists():
            raise ConflictError(f"lease {lease_id:x} has ended; create a new one", reason="discovery.lease_ended")
        content_bytes = len(value) + len(key.encode()) + _HEAD_BYTES
        if content_bytes > MAX_RECORD_BYTES:
            raise PayloadTooLargeError(f"record of {content_bytes} bytes exceeds the limit of {MAX_RECORD_BYTES}")
        revision = self._next_revision()
        stored = StoredRecord(FORMAT, key, revision, lease_id, value, _checksum(key, value))
        temporary = self._tmp / secrets.token_hex(8)
        target = self.root / name
        try:
            temporary.write_bytes(_encode(stored))
            # The revision as modification time tells any two contents of a name apart, however fast they follow.
            os.utime(temporary, ns=(revision, revision))
            if create and not target.exists():
                os.link(temporary, target)
            else:
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        self._cache[name] = (_mark(target.stat()), stored)
        return Record(key, value, revision)

    def _read(self, name: str) -> StoredRecord | None:
        try:
            stored = _decode_record(_content(self.root / name))
        except (FileNotFoundError, *UNREADABLE):
            return None
        whole = stored.format == FORMAT and stored.checksum == _checksum(stored.key, stored.value)
        return stored if whole and quote_segment(stored.key) == name and stored.revision <= _MAX_REVISION else None

    # Leases.

    def create_lease(self, lease_id: int, ttl_s: float, owner: Owner) -> None:
        """Create a lease that counts as just heard of."""
        temporary = self._tmp / secrets.token_hex(8)
        try:
            temporary.write_bytes(_encode(LeaseFile(ttl_s, owner)))
            temporary.replace(self._lease_path(lease_id))
        finally:
            temporary.unlink(missing_ok=True)

    def touch_lease(self, lease_id: int) -> bool:
        """Send a heartbeat; return False if the lease is gone."""
        try:
            os.utime(self._lease_path(lease_id))
        except FileNotFoundError:
            return False
        return True

    def end_lease(self, lease_id: int, heartbeat: tuple[int, int] | None = None) -> bool:
        """Delete a lease and its records, unless its heartbeat is no longer ``heartbeat``; return whether it did."""
        with self._locked():
            path = self._lease_path(lease_id)
            if heartbeat is not None and _heartbeat(path) != heartbeat:
                return False
            # The lease goes last: should this process die in between, another one finishes the work.
            for name in self._names_under(lease_id):
                (self.root / name).unlink(missing_ok=True)
            self._next_revision()
            path.unlink(missing_ok=True)
            return True

    def leases(self) -> list[LeaseSeen]:
        """Return all leases."""
        seen: list[LeaseSeen] = []
        for path in self._leases.iterdir():
            heartbeat = _heartbeat(path)
            if heartbeat is not None and path.is_file():
                with contextlib.suppress(ValueError):
                    seen.append(LeaseSeen(int(path.name, 16), heartbeat, _read_lease(path)))
        return seen

    def _names_under(self, lease_id: int) -> list[str]:
        self.scan()
        found = self._cache.items()
        return [name for name, (_, stored) in found if stored is not None and stored.lease_id == lease_id]

    def _lease_path(self, lease_id: int) -> Path:
        return self._leases / f"{lease_id:x}"

    # Lock and counter.

    @contextlib.contextmanager
    def _locked(self) -> Generator[None, None, None]:
        descriptor = os.open(self._state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise StoreBusyError from error
            raise
        finally:
            os.close(descriptor)

    def _revision(self) -> int:
        try:
            revision = int((self._state / "revision").read_bytes()[:_COUNTER_DIGITS])
        except (FileNotFoundError, ValueError):
            return -1
        return revision if revision <= _MAX_REVISION else -1

    def _next_revision(self) -> int:
        newest = self._revision()
        if newest < 0:
            self.scan()
            # Leap over whatever a lost counter may have given out beyond the records that are left.
            newest = self._floor + _LOST_COUNTER_LEAP if self._floor else 0
        revision = max(newest, self._floor) + 1
        descriptor = os.open(self._state / "revision", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, b"%0*d" % (_COUNTER_DIGITS, revision), 0)
        finally:
            os.close(descriptor)
        self._floor = revision
        return revision


def file_name(key: str) -> str:
    """Return the file name of a key.

    Raises:
        InvalidRequestError: if the key is empty or its name would be too long for a file.
    """
    name = quote_segment(key)
    if not name or len(name) > MAX_FILE_NAME_BYTES:
        raise InvalidRequestError(
            f"discovery key of {len(name)} encoded characters; keys take 1 to {MAX_FILE_NAME_BYTES}",
            param="key",
        )
    return name


def _mark(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_ino, info.st_mtime_ns, info.st_size


def _checksum(key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key.encode()))


def _heartbeat(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except FileNotFoundError:
        return None
    return info.st_ino, info.st_mtime_ns


def _read_lease(path: Path) -> LeaseFile | None:
    try:
        lease = _decode_lease(_content(path))
    except (FileNotFoundError, *UNREADABLE):
        return None
    return lease if 0 < lease.ttl_s < math.inf else None


def _content(path: Path) -> bytes:
    """Return what a file holds, cut off behind what a record may take."""
    with path.open("rb") as file:
        return file.read(MAX_RECORD_BYTES)
