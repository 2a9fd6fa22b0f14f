"""Fetches media by URL. aiohttp comes with the extra ``media`` and is imported when the first URL is fetched."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urljoin

from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._media.parts import MediaRef, check_type, too_large
from dynamo_frontend._media.policy import MediaLimits, check_url, is_allowed, is_public, private_address

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the addresses of a host."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PIECE_BYTES = 64 << 10


async def system_lookup(host: str, port: int) -> list[str]:
    """Return a host's addresses as the system knows them.

    Raises:
        OSError: if it knows none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _ForbiddenHostError(OSError):
    """A host has an address that is not public."""


class CheckedResolver:
    """Resolver of the client: each address it hands out was checked, and only those are connected to.

    A name is looked up once for each connection, so what was checked cannot differ from what is used.
    """

    def __init__(self, limits: MediaLimits, lookup: Lookup) -> None:
        self._limits = limits
        self._lookup = lookup

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[dict[str, Any]]:
        """Return addresses in aiohttp's form.

        Raises:
            OSError: if there are none, or one is not public.
        """
        found = await self._lookup(host, port)
        addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in found]
        if not is_allowed(host, self._limits) and not all(map(is_public, addresses)):
            raise _ForbiddenHostError(f"{host} is not public")
        if not addresses:
            raise OSError(f"{host} has no address")
        return [
            {
                "hostname": host,
                "host": str(address),
                "port": port,
                "family": socket.AF_INET if address.version == 4 else socket.AF_INET6,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses
        ]

    async def close(self) -> None:
        """Do nothing: it holds nothing."""


class MediaFetcher:
    """Fetches URLs within the limits.

    Args:
        limits: What an item may cost.
        lookup: Returns addresses of a host.
    """

    def __init__(self, limits: MediaLimits, lookup: Lookup = system_lookup) -> None:
        self._limits = limits
        self._lookup = lookup
        self._session: Any = None

    async def fetch(self, ref: MediaRef) -> tuple[bytes, str]:
        """Return an item's bytes and media type. Cancelling closes the connection.

        Raises:
            InvalidRequestError: if the URL is forbidden, cannot be reached, or its content is too large or too slow.
            UnsupportedMediaError: if the content is of another kind.
        """
        import aiohttp

        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._follow(ref)
        except TimeoutError:
            reason = f"did not arrive within {self._limits.timeout_s:g} s"
        except aiohttp.ClientError as error:
            if _forbidden(error):
                raise private_address(ref.where) from None
            reason = "cannot be fetched"
        except (OSError, ValueError):
            reason = "cannot be fetched"
        raise InvalidRequestError(
            f"The content of {ref.where} {reason}; send it as a data: URL.",
            reason="request.media_unreachable",
            param=ref.where,
        )

    async def close(self) -> None:
        """Close the client. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _follow(self, ref: MediaRef) -> tuple[bytes, str]:
        url = ref.url
        session = self._client()
        for _ in range(self._limits.max_redirects + 1):
            # A redirect is a new URL like any other: nothing the first one was allowed is allowed to it.
            check_url(url, ref.where, self._limits)
            async with session.get(url, allow_redirects=False) as answer:
                if answer.status in _REDIRECTS and "location" in answer.headers:
                    url = urljoin(url, answer.headers["location"])
                    continue
                return await self._read(ref, answer)
        raise InvalidRequestError(
            f"The URL of {ref.where} redirects more than {self._limits.max_redirects} times; send the last one.",
            reason="request.media_unreachable",
            param=ref.where,
        )

    async def _read(self, ref: MediaRef, answer: Any) -> tuple[bytes, str]:
        if answer.status != 200:
            raise InvalidRequestError(
                f"The URL of {ref.where} answered with status {answer.status}.",
                reason="request.media_unreachable",
                param=ref.where,
            )
        check_type(ref.kind, answer.content_type, ref.where)
        limit = self._limits.max_bytes
        if answer.content_length is not None and answer.content_length > limit:
            raise too_large(ref.where, limit)
        data = bytearray()
        async for piece in answer.content.iter_chunked(_PIECE_BYTES):
            data += piece
            if len(data) > limit:
                raise too_large(ref.where, limit)
        if not data:
            raise InvalidRequestError(f"The content of {ref.where} is empty.", param=ref.where)
        return bytes(data), str(answer.content_type).lower()

    def _client(self) -> Any:
        if self._session is None:
            import aiohttp

            resolver: Any = CheckedResolver(self._limits, self._lookup)
            connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True)
            self._session = aiohttp.ClientSession(
                connector=connector,
                trust_env=False,
                # Packed content could grow without bound while it is unpacked.
                auto_decompress=False,
                headers={"accept-encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _forbidden(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _ForbiddenHostError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
