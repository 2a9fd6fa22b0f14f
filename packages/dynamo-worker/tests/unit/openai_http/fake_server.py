"""A server that speaks the completions API as vLLM does, over real HTTP, with a made-up model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import xxhash
from aiohttp import web

VOCAB = 1000
EOS = 2


class FakeServer:
    """``form`` says what comes out: ``token_ids`` (new vLLM), ``logprobs`` (older), ``text`` (others)."""

    def __init__(
        self, form: str = "token_ids", *, takes_tokens: bool = True, metrics: str = "", root: str = ""
    ) -> None:
        self.form = form
        self.takes_tokens = takes_tokens
        self.metrics = metrics
        self.root = root
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = asyncio.Event()
        self.fail_status: int | None = None
        self.fail_event = False
        self.cut_after: int | None = None
        self.hold_after: int | None = None
        self.silent = asyncio.Event()
        self.max_model_len = 600
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self) -> FakeServer:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._completions)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": "fake", "object": "model", "root": self.root or None, "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [model]})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics, status=200 if self.metrics else 404)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.bodies.append(body)
        if self.fail_status is not None:
            return web.json_response({"error": {"message": "no, thanks"}}, status=self.fail_status)
        if isinstance(body["prompt"], list) and not self.takes_tokens:
            return web.json_response({"error": {"message": "prompt must be text"}}, status=400)
        if body.get("stream"):
            return await self._stream(request, body)
        choices = self._choices(body)
        answer = [self._choice(body, index, tokens, finish) for index, (tokens, finish) in enumerate(choices)]
        return web.json_response({"choices": answer, "usage": self._usage(body, choices)})

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        choices = self._choices(body)
        try:
            for sent in range(max(len(tokens) for tokens, _ in choices)):
                if sent == self.cut_after:
                    request.transport.abort()  # type: ignore[union-attr] - connected here
                    return response
                if sent == self.hold_after:
                    self.silent.set()
                    while request.transport is not None:
                        await asyncio.sleep(0)
                    raise ConnectionResetError
                for index, (tokens, finish) in enumerate(choices):
                    if sent < len(tokens):
                        is_last = sent == len(tokens) - 1
                        event = self._choice(body, index, tokens[sent : sent + 1], finish if is_last else None)
                        await self._send(response, {"choices": [event]})
                await asyncio.sleep(0)
            if self.fail_event:
                await self._send(response, {"error": {"message": "out of memory", "code": 500}})
                return response
            await self._send(response, {"choices": [], "usage": self._usage(body, choices)})
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionResetError, asyncio.CancelledError):
            self.left.set()
            raise
        return response

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _choices(self, body: dict[str, Any]) -> list[tuple[list[int], str]]:
        return [self._output(body, index) for index in range(body.get("n", 1))]

    def _output(self, body: dict[str, Any], choice: int) -> tuple[list[int], str]:
        history = body["prompt"] if isinstance(body["prompt"], list) else list(body["prompt"].encode())
        if not all(0 <= token < VOCAB for token in history):
            raise web.HTTPBadRequest
        seed = (body.get("seed", 0), choice) if body.get("temperature") else (0, 0)
        tokens: list[int] = []
        ends = {*body.get("stop_token_ids", ())} | (set() if body.get("ignore_eos") else {EOS})
        limit = body["max_tokens"] if body.get("max_tokens") is not None else 16
        while len(tokens) < limit:
            token = _next(history, seed)
            if token in ends and len(tokens) < body.get("min_tokens", 0):
                token = next(other for other in range(3, VOCAB) if other not in ends)
            tokens.append(token)
            if token in ends:
                return tokens, "stop"
            history = [*history, token]
        return tokens, "length"

    def _choice(self, body: dict[str, Any], index: int, tokens: Sequence[int], finish: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": "".join(f" w{t}" for t in tokens), "finish_reason": finish}
        if self.form == "token_ids" and body.get("return_token_ids"):
            choice["token_ids"] = list(tokens)
        if body.get("logprobs") is not None and self.form != "text":
            named = body.get("return_tokens_as_token_ids")
            names = [f"token_id:{t}" if named else f" w{t}" for t in tokens]
            tops = [{name: -0.5, "token_id:7": -1.5} for name in names] if body["logprobs"] else None
            choice["logprobs"] = {"tokens": names, "token_logprobs": [-0.5] * len(names), "top_logprobs": tops}
        return choice

    def _usage(self, body: dict[str, Any], choices: list[tuple[list[int], str]]) -> dict[str, Any]:
        count = sum(len(tokens) for tokens, _ in choices)
        details = {"cached_tokens": len(body["prompt"]) // 2}
        return {"prompt_tokens": len(body["prompt"]), "completion_tokens": count, "prompt_tokens_details": details}


def _next(history: Sequence[int], seed: tuple[int, int]) -> int:
    return 3 + xxhash.xxh3_64_intdigest(repr((seed, *history)).encode()) % (VOCAB - 3)
