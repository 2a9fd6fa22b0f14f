"""A discovery plane: `dynamo worker --discovery sqlite:///var/lib/dynamo.db`."""

import asyncio
import contextlib
import secrets
import sqlite3
import time
import urllib.parse
from threading import Lock

from dynamo_core.discovery import DEFAULT_LEASE_TTL_S, DiscoveryStatus, Record, RecordDeleted, RecordPut, WatchSynced
from dynamo_core.errors import ConfigurationError, ConflictError, UnavailableError

TABLES = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS log (revision INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT, value BLOB);
CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value BLOB, revision INTEGER, lease INTEGER);
CREATE TABLE IF NOT EXISTS leases (id INTEGER PRIMARY KEY, ends_at REAL);
"""
LOG_ROWS = 10_000
"""Changes that are kept for watches; one that falls further behind gets the difference to the present."""


class SqliteLease:
    """A row that its owner must touch, or it ends."""

    def __init__(self, discovery, lease_id, ttl_s):
        self.ttl_s = ttl_s
        self.valid = True
        self.id = lease_id
        self._discovery = discovery

    async def revoke(self):
        """End it and delete its records."""
        if self.valid:
            self.valid = False
            await self._discovery.end_lease(self.id)


class SqliteDiscovery:
    """Discovery in one file. A log of changes numbers them all; watches read it."""

    def __init__(self, path, clock, poll_s):
        self._path, self._clock, self._poll_s = path, clock, poll_s
        self._lock = Lock()
        self._leases = {}
        self._db = self._tending = None
        self._closing = asyncio.Event()

    async def start(self):
        """Open the file. Raises ``UnavailableError`` if that fails."""
        try:
            self._db = await asyncio.to_thread(self._open)
        except sqlite3.Error as error:
            raise UnavailableError(f"{self._path}: {error}", reason="discovery.unavailable") from error
        self._tending = asyncio.create_task(self._tend())

    async def close(self):
        """Revoke own leases and end watches."""
        if self._closing.is_set():
            return
        for lease in list(self._leases.values()):
            await lease.revoke()
        self._closing.set()
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
            self._db.close()

    async def lease(self, ttl_s=DEFAULT_LEASE_TTL_S):
        """Create a lease; it is touched in the background."""
        lease = SqliteLease(self, secrets.randbits(62) + 1, ttl_s)
        await self._write(self._touch, lease)
        self._leases[lease.id] = lease
        return lease

    async def put(self, key, value, *, lease=None):
        """Write a key; return its revision."""
        return await self._write(self._put, key, value, lease)

    async def compare_and_set(self, key, value, *, expected, lease=None):
        """Write a key if its revision is ``expected``; else return None."""
        return await self._write(self._put_if, key, value, expected, lease)

    async def get(self, key):
        """Return a record, or None."""
        found = await self._write(self._select, "key = ?", key)
        return found[0] if found else None

    async def delete(self, key):
        """Delete a key; return whether it was there."""
        return await self._write(self._delete, "key = ?", key) > 0

    async def list(self, prefix):
        """Return the records under a prefix."""
        return await self._write(self._select, "substr(key, 1, length(?1)) = ?1", prefix)

    async def end_lease(self, lease_id):
        """Delete a lease and its records."""
        self._leases.pop(lease_id, None)
        await self._write(self._end, lease_id)

    async def watch(self, prefix):
        """Yield present records, ``WatchSynced``, then changes."""
        shown, revision, resync = {}, None, False
        while not self._closing.is_set():
            changes, revision, whole = await self._write(self._changes, prefix, revision, shown)
            for change in changes:
                if isinstance(change, RecordPut):
                    shown[change.key] = change.revision
                else:
                    shown.pop(change.key, None)
                yield change
            if whole:
                yield WatchSynced(revision, resync=resync)
                resync = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._poll_s)

    def status(self):
        """Say whether the file is open."""
        return DiscoveryStatus(connected=self._db is not None and not self._closing.is_set(), detail=str(self._path))

    # In a thread, each within one transaction.

    async def _write(self, work, *arguments):
        if self._closing.is_set() or self._db is None:
            raise UnavailableError("this discovery client is not open", reason="discovery.closed")
        return await asyncio.to_thread(self._transaction, work, arguments)

    def _transaction(self, work, arguments):
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            return work(*arguments)

    def _open(self):
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=5.0)
        db.executescript(TABLES)
        return db

    def _touch(self, lease):
        self._db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?)", (lease.id, time.time() + lease.ttl_s))

    def _put(self, key, value, lease):
        if lease is not None and not self._db.execute("SELECT 1 FROM leases WHERE id = ?", (lease.id,)).fetchone():
            raise ConflictError("the lease has ended; create a new one", reason="discovery.lease_ended")
        revision = self._note(key, value)
        row = (key, value, revision, lease.id if lease else None)
        self._db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", row)
        return revision

    def _put_if(self, key, value, expected, lease):
        found = self._db.execute("SELECT revision FROM records WHERE key = ?", (key,)).fetchone()
        return self._put(key, value, lease) if (found[0] if found else None) == expected else None

    def _select(self, where, argument):
        rows = self._db.execute(f"SELECT key, value, revision FROM records WHERE {where} ORDER BY key", (argument,))
        return [Record(*row) for row in rows]

    def _delete(self, where, argument):
        keys = [key for (key,) in self._db.execute(f"SELECT key FROM records WHERE {where}", (argument,)).fetchall()]
        for key in keys:
            self._db.execute("DELETE FROM records WHERE key = ?", (key,))
            self._note(key, None)
        return len(keys)

    def _end(self, lease_id):
        self._db.execute("DELETE FROM leases WHERE id = ?", (lease_id,))
        self._delete("lease = ?", lease_id)

    def _note(self, key, value):
        revision = self._db.execute("INSERT INTO log (key, value) VALUES (?, ?)", (key, value)).lastrowid
        self._db.execute("DELETE FROM log WHERE revision <= ?", (revision - LOG_ROWS,))
        return revision

    def _changes(self, prefix, revision, shown):
        oldest, newest = self._db.execute(
            "SELECT coalesce(min(revision), 1), coalesce(max(revision), 0) FROM log"
        ).fetchone()
        if revision is None or revision < oldest - 1:
            present = self._select("substr(key, 1, length(?1)) = ?1", prefix)
            keys = {record.key for record in present}
            gone = [RecordDeleted(key, newest) for key in shown if key not in keys]
            changed = [record for record in present if shown.get(record.key) != record.revision]
            return gone + [RecordPut(each.key, each.value, each.revision) for each in changed], newest, True
        rows = self._db.execute("SELECT revision, key, value FROM log WHERE revision > ?", (revision,)).fetchall()
        found = [
            RecordDeleted(key, number) if value is None else RecordPut(key, value, number)
            for number, key, value in rows
            if key.startswith(prefix)
        ]
        return found, newest, False

    async def _tend(self):
        while True:
            await self._clock.sleep(min([lease.ttl_s for lease in self._leases.values()], default=1.0) / 3)
            for lease in list(self._leases.values()):
                await self._write(self._touch, lease)
            await self._write(self._reap)

    def _reap(self):
        ended = self._db.execute("SELECT id FROM leases WHERE ends_at < ?", (time.time(),)).fetchall()
        for (lease_id,) in ended:
            self._end(lease_id)


def sqlite_discovery(url, *, clock, options):
    """The factory that the entry point names; the runtime may give ``metrics``, which this plane has none of."""
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    unknown = set(options) - {"metrics", "poll_s"}
    if not path or unknown:
        raise ConfigurationError(
            f"discovery {url!r} with {sorted(options)} is not sqlite:///file with the option poll_s"
        )
    return SqliteDiscovery(path, clock, float(options.get("poll_s", 0.05)))
