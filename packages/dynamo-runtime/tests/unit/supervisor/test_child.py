from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from dynamo_runtime._supervisor.child import MAX_LINE_BYTES, ChildProcess, ReadyLine

Script = Callable[[str], tuple[str, ...]]


async def test_output_comes_line_by_line_with_its_name(script: Script, output: Any) -> None:
    body = """
    print("one"); print("two", file=sys.stderr); sys.stdout.write("no newline")
    """
    child = await ChildProcess.launch("worker-1", script(body), {}, output)
    assert await child.wait() == 0
    assert sorted(output.lines) == ["! worker-1 | two", "worker-1 | no newline", "worker-1 | one"]


async def test_a_line_without_end_is_cut_and_nothing_is_lost(script: Script, output: Any) -> None:
    length = 5 * MAX_LINE_BYTES + 7
    child = await ChildProcess.launch("w", script(f"sys.stdout.write('x' * {length})"), {}, output)
    await child.wait()
    pieces = [line.removeprefix("w | ") for line in output.lines]
    assert sum(map(len, pieces)) == length
    assert len(pieces) > 1


async def test_its_own_complaint_is_kept_for_the_supervisor(script: Script, output: Any) -> None:
    body = "print('dynamo: error: no such model', file=sys.stderr); sys.exit(2)"
    child = await ChildProcess.launch("w", script(body), {}, output)
    assert await child.wait() == 2
    assert (child.error_line, output.lines) == ("no such model", [])


async def test_it_says_when_it_is_ready_and_where_its_status_is(script: Script, output: Any) -> None:
    child = await ChildProcess.launch("w", script("ready('http://127.0.0.1:1'); wait()"), {}, output)
    assert await child.ready() == ReadyLine("http://127.0.0.1:1")
    child.terminate()
    assert await child.wait() == -signal.SIGTERM


async def test_an_end_without_a_ready_line_is_no_readiness(script: Script, output: Any) -> None:
    child = await ChildProcess.launch("w", script(""), {}, output)
    assert await child.ready() is None
    await child.wait()


async def test_it_has_a_session_of_its_own_and_its_environment(script: Script, output: Any) -> None:
    body = "print(os.getsid(0) == os.getpid(), os.environ['COLOUR'], os.environ['DYN_RUNTIME_PARENT_PID'])"
    child = await ChildProcess.launch("w", script(body), {"COLOUR": "blue"}, output)
    await child.wait()
    assert output.lines == [f"w | True blue {os.getpid()}"]


async def test_what_it_left_behind_in_its_group_is_killed(script: Script, output: Any) -> None:
    body = """
    pid = os.fork()
    if pid == 0:
        wait()
    print(pid, flush=True)
    os._exit(3)
    """
    child = await ChildProcess.launch("w", script(body), {}, output)
    assert await asyncio.wait_for(child.wait(), 20) == 3
    orphan = int(output.lines[0].removeprefix("w | "))
    with pytest.raises(ProcessLookupError):
        while True:
            os.kill(orphan, 0)
            with open(f"/proc/{orphan}/stat", encoding="ascii") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    raise ProcessLookupError
            await asyncio.sleep(0.005)


async def test_a_program_that_is_not_there_is_an_error(output: Any) -> None:
    with pytest.raises(OSError, match="nowhere"):
        await ChildProcess.launch("w", ("/nowhere/program",), {}, output)
