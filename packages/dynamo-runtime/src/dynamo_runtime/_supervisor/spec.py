"""What the supervisor keeps running, and how it treats failures."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from dynamo_runtime._settings import SupervisorSettings


@dataclass(frozen=True)
class ProcessSpec:
    """One role: replicas of one command.

    A process says that it is ready with one JSON line on the file descriptor ``DYN_RUNTIME_READY_FD``; every
    ``dynamo`` component does.

    Attributes:
        role: Name by which it is scaled.
        command: Program and arguments.
        replicas: Count to start with.
        env: Changes to the environment.
        drain_timeout_s: Time between SIGTERM and SIGKILL.
        gpus: Devices per replica, handed out as ``CUDA_VISIBLE_DEVICES``; 0 leaves that variable alone.
    """

    role: str
    command: tuple[str, ...]
    replicas: int = 1
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    drain_timeout_s: float = 30.0
    gpus: int = 0


def component_command(component: str, *flags: str) -> tuple[str, ...]:
    """Return the command line that runs a component with this interpreter."""
    return (sys.executable, "-m", "dynamo_runtime", component, *flags)


class Backoff:
    """Waits between restarts of one replica: exponential, forgotten after a stable run, limited in number."""

    def __init__(self, settings: SupervisorSettings) -> None:
        self._settings = settings
        self._failures = 0

    def next_delay_s(self, ready_for_s: float) -> float | None:
        """Return the wait before the next start, or None to give up.

        Args:
            ready_for_s: How long the run that just ended had been ready.
        """
        if ready_for_s >= self._settings.stable_after_s > 0:
            self._failures = 0
        if self._failures >= self._settings.restart_limit:
            return None
        delay_s = self._settings.restart_initial_s * 2**self._failures
        self._failures += 1
        return min(delay_s, self._settings.restart_max_s)
