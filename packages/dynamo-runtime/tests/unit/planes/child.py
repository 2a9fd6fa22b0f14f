"""Programs that the tests run in processes of their own, to kill or to stop them."""

from __future__ import annotations

import asyncio
import errno
import resource
import sys
from pathlib import Path

from dynamo_core.clock import SystemClock
from dynamo_core.errors import UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext, ResponseSink, Topic
from dynamo_runtime._bus.bus import ZmqEventBus
from dynamo_runtime._discovery.file import FileDiscovery
from dynamo_runtime._plane.plane import TcpRequestPlane

ENDPOINT = EndpointId("test", "backend", "generate")
TOPIC = Topic("events", "test")


def say(*words: object) -> None:
    print(*words, flush=True)


async def serve(url: str) -> None:
    """Serve an endpoint that sends one item and then waits for ever."""

    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(payload)
        if payload != b"end":
            await asyncio.Event().wait()

    plane = TcpRequestPlane(url, clock=SystemClock())
    await plane.start()
    served = await plane.serve(ENDPOINT, handler)
    say(served.address)
    await asyncio.Event().wait()


async def hold_lease(root: str, ttl_s: str) -> None:
    """Hold a key under a lease."""
    discovery = FileDiscovery(Path(root), clock=SystemClock())
    await discovery.start()
    lease = await discovery.lease(float(ttl_s))
    await discovery.put("held/key", b"value", lease=lease)
    say("held")
    await asyncio.Event().wait()


async def fill_disk(root: str) -> None:
    """Write where not a byte may be written any more, and say how that shows."""
    discovery = FileDiscovery(Path(root), clock=SystemClock())
    await discovery.start()
    await discovery.put("a/1", b"before")
    watch = discovery.watch("a/")
    await anext(watch)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        await discovery.put("a/1", b"after")
    except UnavailableError as error:
        cause = error.__cause__
        assert isinstance(cause, OSError)
        say("refused", error.reason, errno.errorcode[cause.errno or 0], discovery.status().connected)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = await discovery.get("a/1")
    assert kept is not None
    say("kept", kept.value.decode())
    await discovery.put("a/1", b"whole")
    say("whole", discovery.status().connected)
    await discovery.close()


async def hold_lock(root: str) -> None:
    """Take the directory's lock and keep it."""
    import fcntl

    with open(Path(root) / ".state" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        say("locked")
        await asyncio.Event().wait()


async def publish(root: str) -> None:
    """Publish an event for each line read."""
    discovery = FileDiscovery(Path(root), clock=SystemClock())
    await discovery.start()
    bus = ZmqEventBus("zmq://127.0.0.1:0", discovery=discovery, clock=SystemClock())
    publisher = await bus.publisher(TOPIC)
    say(publisher.id)
    while line := await asyncio.to_thread(sys.stdin.readline):
        say(publisher.publish(line.strip().encode()))
        await asyncio.sleep(0)


PROGRAMS = {program.__name__: program for program in (serve, hold_lease, fill_disk, hold_lock, publish)}

if __name__ == "__main__":
    asyncio.run(PROGRAMS[sys.argv[1]](*sys.argv[2:]))
