"""A scaling target behind two commands of the operator's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynamo_core.component import ComponentContext
from dynamo_core.errors import ConfigurationError, InvalidRequestError, NotFoundError, UnavailableError
from dynamo_core.planning import PoolState, ScalingTarget

MAX_OUTPUT_BYTES = 1 << 20


class CommandTarget:
    """Runs one command to read the pools and one to scale them.

    The first prints a JSON object: role to an object with ``ready``, ``starting``, ``draining``, ``desired``,
    ``failed`` and ``startup_s``, each optional. The second gets one argument ``role=count`` for each role to change.
    Neither goes through a shell. A command that fails, prints nonsense or takes too long is a target that cannot be
    reached.

    Args:
        state: Command and arguments that print the pools.
        scale: Command and arguments that scale.
        timeout_s: Limit of either.
    """

    def __init__(self, state: Sequence[str], scale: Sequence[str], *, timeout_s: float = 30.0) -> None:
        self._state_command = list(state)
        self._scale_command = list(scale)
        self._timeout_s = timeout_s
        self._decoder = msgspec.json.Decoder(dict[str, PoolState])
        self._last_decision = 0

    async def start(self) -> None:
        """Nothing to connect."""

    async def state(self) -> Mapping[str, PoolState]:
        """Return what the command prints.

        Raises:
            UnavailableError: if it fails.
        """
        output = await self._run(self._state_command)
        try:
            return self._decoder.decode(output)
        except msgspec.MsgspecError as error:
            raise UnavailableError(f"command {self._state_command[0]!r} printed no pools: {error}") from error

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        """Run the command for the roles that are to change.

        Raises:
            NotFoundError: for an unknown role.
            InvalidRequestError: for a count below 0.
            UnavailableError: if the command fails.
        """
        pools = await self.state()
        for role, count in replicas.items():
            if role not in pools:
                raise NotFoundError(f"command target has no role {role!r}; it has {sorted(pools)}")
            if count < 0:
                raise InvalidRequestError(f"{count} replicas of {role!r} asked for; give at least 0", param=role)
        if decision_id and decision_id <= self._last_decision:
            return
        changes = [f"{role}={count}" for role, count in replicas.items() if pools[role].desired != count]
        if changes:
            await self._run([*self._scale_command, *changes])
        self._last_decision = max(self._last_decision, decision_id)

    async def close(self) -> None:
        """Nothing to disconnect."""

    async def _run(self, command: Sequence[str]) -> bytes:
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
            )
        except OSError as error:
            raise UnavailableError(f"command {command[0]!r} cannot be run: {error.strerror}") from error
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                output = await process.stdout.read(MAX_OUTPUT_BYTES)
                status = await process.wait()
        except TimeoutError as error:
            raise UnavailableError(f"command {command[0]!r} took more than {self._timeout_s:g} s") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if status:
            raise UnavailableError(f"command {command[0]!r} ended with status {status}")
        return output


def create_command_target(context: ComponentContext, options: Mapping[str, Any]) -> ScalingTarget:
    """Return the target that ``--target-options`` describes: ``state``, ``scale`` and perhaps ``timeout_s``.

    Raises:
        ConfigurationError: if a command is missing or no list of strings.
    """
    try:
        wanted = msgspec.convert(dict(options), _Options)
    except msgspec.ValidationError as error:
        raise ConfigurationError(
            f"options of target 'command' are wrong: {error}; give state and scale, each a list of strings"
        ) from error
    return CommandTarget(wanted.state, wanted.scale, timeout_s=wanted.timeout_s)


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    state: list[str]
    scale: list[str]
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.state or not self.scale:
            raise ValueError("state and scale must not be empty")
