"""Constrained requests before they reach the core: their grammars are made on worker threads, not between steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_core.errors import DynamoError, InvalidRequestError, as_dynamo_error
from dynamo_core.requests import GenerateRequest
from dynamo_worker._reference._core import ActiveRequest
from dynamo_worker._reference._grammar import Grammar, GrammarCompiler

Done = Callable[[ActiveRequest, "DynamoError | None"], None]


class Constraints:
    """Gives requests their grammars, on the event loop.

    Args:
        compiler: Makes grammars.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self.is_available = compiler.is_available
        self._compiler = compiler
        self._preparing: dict[ActiveRequest, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._compiler)

    def require_available(self, request: GenerateRequest) -> None:
        """Refuse a constraint where none can be followed.

        Raises:
            InvalidRequestError: saying what is missing.
        """
        if request.sampling.guided is not None and not self.is_available:
            raise InvalidRequestError(
                "guided is not offered for this model: it needs a tokenizer.json with the model, an end token, and the "
                "package llguidance; leave it out or use another worker",
                param="guided",
            )

    def apply_kept(self, active: ActiveRequest) -> bool:
        """Constrain a fresh request by a grammar that is at hand; False if it has to be prepared."""
        guided = active.request.sampling.guided
        grammar = None if guided is None or active.request.accepted_tokens else self._compiler.kept(guided)
        if grammar is not None:
            active.constrain(grammar)
        return grammar is not None

    def prepare(self, active: ActiveRequest, done: Done) -> None:
        """Make a request's grammar; ``done`` hears once, on the event loop, unless the request is given up."""
        self._preparing[active] = asyncio.ensure_future(self._prepare(active, done))

    def give_up(self, active: ActiveRequest) -> bool:
        """Forget a request; False if its grammar is not being made."""
        task = self._preparing.pop(active, None)
        if task is not None:
            task.cancel()
        return task is not None

    def give_up_all(self) -> list[ActiveRequest]:
        """Forget all requests and return them."""
        return [active for active in list(self._preparing) if self.give_up(active)]

    async def _prepare(self, active: ActiveRequest, done: Done) -> None:
        found = await asyncio.to_thread(self._outcome, active.request)
        self._preparing.pop(active, None)
        if isinstance(found, Grammar):
            active.constrain(found)
        done(active, found if isinstance(found, DynamoError) else None)

    def _outcome(self, request: GenerateRequest) -> Grammar | DynamoError:
        try:
            return self._compiler.prepare(request)
        except Exception as error:  # noqa: BLE001 - whatever fails, the request that waits for it is told
            return as_dynamo_error(error)
