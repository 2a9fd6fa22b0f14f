"""``dynamo-frontend chat``: a chat in the terminal with any OpenAI-compatible server, and what each answer cost."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dynamo_core.errors import BackendProtocolError, ConfigurationError, DynamoError, UnavailableError
from dynamo_core.settings import resolve_settings
from dynamo_frontend._settings import ChatSettings

_CONNECT_TIMEOUT_S = 10.0
_HELP = """  /help           this text
  /model [NAME]   show the models, or change to one
  /system TEXT    what the model is told first; empty for nothing
  /reset          forget the conversation
  /quit           leave, as Ctrl-D does
Ctrl-C stops an answer, not the program."""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(slots=True)
class Answer:
    """An answer while it comes.

    Attributes:
        text: So far, without the reasoning.
        ttft_s: Seconds to the first piece; None before it.
        duration_s: Seconds from the first piece to the last.
        usage: The server's accounting, if it sent one.
        worker: Who made it, where the server says so.
        receipt: Id of the routing decision, where the server says so.
    """

    text: list[str] = field(default_factory=list[str])
    ttft_s: float | None = None
    duration_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    worker: str = ""
    receipt: str = ""

    def summary(self) -> str:
        """Return one line of what is known."""
        parts = [f"ttft {self.ttft_s * 1e3:.0f} ms"] if self.ttft_s is not None else []
        tokens = self.usage.get("completion_tokens")
        if tokens:
            rate = f", {(tokens - 1) / self.duration_s:.1f} tokens/s" if tokens > 1 and self.duration_s else ""
            parts.append(f"{tokens} tokens{rate}")
        prompt = self.usage.get("prompt_tokens")
        if prompt:
            cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            parts.append(f"{cached} of {prompt} prompt tokens cached")
        parts += [f"worker {self.worker}"] if self.worker else []
        parts += [f"receipt {self.receipt}"] if self.receipt else []
        return " | ".join(parts)


class ChatClient:
    """Speaks to a server.

    Args:
        settings: Where it is, and how to ask.

    Raises:
        ConfigurationError: if the URL is none.
    """

    def __init__(self, settings: ChatSettings) -> None:
        parts = urlsplit(settings.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(
                f"base_url {settings.base_url!r} is not http://host:port; give the server's base URL", param="base_url"
            )
        self._parts = parts
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._settings = settings

    def models(self) -> list[str]:
        """Return the names of the models.

        Raises:
            DynamoError: if the server cannot be reached or answers something else.
        """
        with self._exchange("GET", "/v1/models") as response:
            try:
                return [str(item["id"]) for item in json.load(response)["data"]]
            except (ValueError, LookupError, TypeError) as error:
                raise BackendProtocolError(f"{self._settings.base_url} lists no models: {error!r}") from error

    def ask(
        self, model: str, messages: Sequence[dict[str, str]], answer: Answer
    ) -> Generator[tuple[str, str], None, None]:
        """Yield the pieces of an answer as they come: ``text`` or ``reasoning``, and the piece.

        Raises:
            DynamoError: if it fails; what came until then stays in the answer.
        """
        body = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        for name in ("max_tokens", "temperature"):
            if (value := getattr(self._settings, name)) is not None:
                body[name] = value
        began = time.monotonic()
        with self._exchange("POST", "/v1/chat/completions", body) as response:
            answer.worker = response.headers.get("x-dynamo-worker-id") or response.headers.get("x-dynamo-upstream", "")
            answer.receipt = response.headers.get("x-dynamo-decision-id", "")
            for event in _events(response):
                answer.usage = event.get("usage") or answer.usage
                for piece in _pieces(event):
                    now = time.monotonic()
                    answer.ttft_s = now - began if answer.ttft_s is None else answer.ttft_s
                    answer.duration_s = now - began - answer.ttft_s
                    if piece[0] == "text":
                        answer.text.append(piece[1])
                    yield piece

    @contextlib.contextmanager
    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Generator[http.client.HTTPResponse, None, None]:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=_CONNECT_TIMEOUT_S)
        headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
        key = self._settings.api_key.get_secret_value()
        if key:
            headers["authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            # An answer may take its time; whoever waits can press Ctrl-C.
            connection.sock.settimeout(None)
            data = json.dumps(body).encode() if body is not None else None
            connection.request(method, self._prefix + path, data, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise BackendProtocolError(f"status {response.status}: {_message(response.read())}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"{self._settings.base_url}: {error or type(error).__name__}") from error
        finally:
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    kind = ""
    while line := response.readline():
        name, _, value = line.decode(errors="replace").rstrip("\r\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data" and kind == "error":
            raise BackendProtocolError(_message(value.encode()))
        elif name == "data" and value == "[DONE]":
            return
        elif name == "data":
            yield json.loads(value)
    raise UnavailableError("the server broke off in the middle of its answer")


def _pieces(event: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        for kind, name in (("reasoning", "reasoning_content"), ("text", "content")):
            if delta.get(name):
                yield kind, delta[name]


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:300].decode(errors="replace")


class Chat:
    """The conversation.

    Args:
        client: The server.
        model: Whom to ask; the server's first model if empty.
        system: What the model is told first.
        write: Puts text on the terminal.
        colours: Whether to show reasoning dimmed.
    """

    def __init__(
        self, client: ChatClient, model: str, system: str, write: Callable[[str], None], *, colours: bool
    ) -> None:
        self._client = client
        self._write = write
        self._dim, self._plain = (_DIM, _PLAIN) if colours else ("", "")
        self._system = system
        self._messages: list[dict[str, str]] = []
        self.model = model or client.models()[0]

    def take(self, line: str) -> bool:
        """Obey a line; return False if it was the last."""
        text = line.strip()
        if text in ("/quit", "/exit"):
            return False
        try:
            if text.startswith("/"):
                self._command(*text.split(maxsplit=1))
            elif text:
                self._answer(text)
        except DynamoError as error:
            self._write(f"\n! {error.message}\n")
        return True

    def _command(self, name: str, rest: str = "") -> None:
        if name == "/model" and rest:
            self.model = rest
        elif name == "/model":
            self._write("".join(f"{'*' if name == self.model else ' '} {name}\n" for name in self._client.models()))
        elif name == "/system":
            self._system = rest
        elif name == "/reset":
            self._messages.clear()
        else:
            self._write(("" if name == "/help" else f"{name} is no command.\n") + _HELP + "\n")

    def _answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self._system}] if self._system else []
        answer = Answer()
        pieces = self._client.ask(self.model, [*system, *self._messages], answer)
        stopped = False
        try:
            with contextlib.closing(pieces):
                self._show(pieces)
        except KeyboardInterrupt:
            stopped = True
        finally:
            if answer.text:
                self._messages.append({"role": "assistant", "content": "".join(answer.text)})
            else:
                self._messages.pop()
        self._write(f"\n{self._dim}[{'stopped | ' if stopped else ''}{answer.summary()}]{self._plain}\n")

    def _show(self, pieces: Iterator[tuple[str, str]]) -> None:
        shown = "text"
        for kind, piece in pieces:
            if kind != shown:
                self._write(self._dim if kind == "reasoning" else f"{self._plain}\n")
                shown = kind
            self._write(piece)
        self._write(self._plain if shown == "reasoning" else "")


def chat(arguments: Sequence[str]) -> int:
    """Run the chat until its input ends.

    Raises:
        DynamoError: if the server cannot be reached at the start.
    """
    resolved = resolve_settings(
        "dynamo-frontend chat", (ChatSettings,), arguments, description="Chat with a model in the terminal."
    )
    settings = resolved.get(ChatSettings)
    with contextlib.suppress(ImportError):
        # It gives input() its line editing by being there.
        importlib.import_module("readline")
    conversation = Chat(ChatClient(settings), settings.model, settings.system, _print, colours=sys.stdout.isatty())
    _print(f"{conversation.model} at {settings.base_url}; /help shows what there is\n")
    while True:
        try:
            line = input("> ")
        except EOFError:
            _print("\n")
            return 0
        except KeyboardInterrupt:
            _print("\n")
            continue
        if not conversation.take(line):
            return 0


def _print(text: str) -> None:
    print(text, end="", flush=True)  # noqa: T201 - the terminal is what this is for
