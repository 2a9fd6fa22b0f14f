"""The chat in a terminal: driven through a pseudo-terminal, against a real frontend."""

import asyncio
import contextlib
import fcntl
import os
import pty
import signal
import sys
import termios

import pytest

from dynamo_frontend._cli import main


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self):
        self.text = ""
        self.grown = asyncio.Event()

    async def start(self, *arguments):
        self.leader, follower = pty.openpty()
        attributes = termios.tcgetattr(follower)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(follower, termios.TCSANOW, attributes)
        argv = [sys.executable, "-m", "dynamo_frontend", "chat", *arguments]
        ends = {"stdin": follower, "stdout": follower, "stderr": follower}
        # The terminal becomes the new session's own, so that its Ctrl-C reaches the program.
        self.process = await asyncio.create_subprocess_exec(
            *argv, **ends, start_new_session=True, preexec_fn=lambda: _take_terminal(0)
        )
        os.close(follower)
        asyncio.get_running_loop().add_reader(self.leader, self._read)

    def _read(self):
        with contextlib.suppress(OSError):
            self.text += os.read(self.leader, 65536).decode()
            self.grown.set()
            return
        asyncio.get_running_loop().remove_reader(self.leader)

    def type(self, text):
        self.text = ""
        os.write(self.leader, text.encode())

    async def until(self, expected):
        async with asyncio.timeout(30):
            while expected not in self.text:
                self.grown.clear()
                await self.grown.wait()

    async def close(self):
        asyncio.get_running_loop().remove_reader(self.leader)
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        os.close(self.leader)


def _take_terminal(descriptor):
    # Whoever runs the tests in the background has its shell ignore Ctrl-C for all below; a terminal's programs do not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.fixture
async def terminal():
    found = Terminal()
    yield found
    await found.close()


async def test_a_conversation_in_a_terminal(stack, terminal):
    stack.say("<think>\nHmm.\n</think>\nHello there")
    await stack.start()
    await terminal.start("--base-url", stack.frontend.url, "--temperature", "0")
    await terminal.until("> ")
    assert "tiny at http://" in terminal.text
    terminal.type("Hi\n")
    await terminal.until("receipt")
    await terminal.until("> ")
    assert "Hello there" in terminal.text
    assert "\x1b[2mHmm." in terminal.text
    for part in ("ttft ", f"{len(stack.script.output)} tokens", "7 of ", "prompt tokens cached", "worker 1/0"):
        assert part in terminal.text
    terminal.type("/help\n")
    await terminal.until("/system TEXT")
    await terminal.until("> ")
    terminal.type("/model\n")
    await terminal.until("* tiny")
    await terminal.until("> ")
    # An answer that does not end is stopped by Ctrl-C; the program and what was said so far stay.
    arrived = asyncio.Event()

    async def hold(request):
        arrived.set()
        await asyncio.Event().wait()

    stack.script.before = hold
    terminal.type("And you?\n")
    async with asyncio.timeout(20):
        await arrived.wait()
    terminal.type("\x03")
    await terminal.until("stopped")
    await terminal.until("> ")
    stack.script.before = None
    terminal.type("Still here?\n")
    await terminal.until("receipt")
    await terminal.until("> ")
    prompt = stack.tokenizer.decode(list(memoryview(stack.script.requests[-1].token_ids).cast("I")))
    assert "Hello there" in prompt
    assert "And you?" not in prompt
    terminal.type("/quit\n")
    async with asyncio.timeout(20):
        assert await terminal.process.wait() == 0


async def test_errors_are_shown_and_do_not_end_it(stack, terminal):
    await stack.start()
    await terminal.start("--base-url", stack.frontend.url, "--model", "nonesuch")
    await terminal.until("> ")
    terminal.type("Hi\n")
    await terminal.until("does not exist")
    await terminal.until("> ")
    terminal.type("/nonsense\n")
    await terminal.until("is no command")
    await terminal.until("> ")
    terminal.type("\x04")
    async with asyncio.timeout(20):
        assert await terminal.process.wait() == 0


@pytest.mark.parametrize(("url", "status"), [("nonsense", 2), ("http://127.0.0.1:9", 1)])
def test_a_server_that_is_not_there_is_named(capsys, url, status):
    assert main(["chat", "--base-url", url]) == status
    assert url in capsys.readouterr().err
