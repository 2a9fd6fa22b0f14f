"""Which URLs may be fetched: the rules that keep a client from reaching what only this machine can reach."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from dynamo_core.errors import InvalidRequestError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_SCHEMES = frozenset({"http", "https"})
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_MAX_URL_CHARS = 8192


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What a request's media may cost.

    Attributes:
        urls: ``fetch`` them, ``pass`` them on to the worker, or ``refuse`` them.
        max_bytes: Most bytes of one item.
        max_items: Most items of one request.
        timeout_s: Time for one item to arrive, redirects included.
        max_redirects: Most redirects of one item.
        allowed_hosts: Hosts that may have addresses of any kind, such as a store inside the network.
        concurrency: Items fetched at a time.
    """

    urls: str = "fetch"
    max_bytes: int = 20 << 20
    max_items: int = 16
    timeout_s: float = 10.0
    max_redirects: int = 3
    allowed_hosts: Collection[str] = ()
    concurrency: int = 16


def is_public(address: Address) -> bool:
    """Return whether an address is reachable by everyone, looking through the forms that carry one in another."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _carried(address)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _carried(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 one stands for: mapped, compatible, 6to4, Teredo or NAT64."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    low = int(address) & 0xFFFF_FFFF
    if address in _NAT64 or (int(address) >> 32 == 0 and low > 1):
        return ipaddress.IPv4Address(low)
    return None


def check_url(url: str, where: str, limits: MediaLimits) -> SplitResult:
    """Return the parts of a URL that may be looked up.

    Raises:
        InvalidRequestError: for another scheme, credentials, or an address that is not public.
    """
    if len(url) > _MAX_URL_CHARS:
        raise InvalidRequestError(f"The URL of {where} is longer than {_MAX_URL_CHARS} characters.", param=where)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InvalidRequestError(f"The URL of {where} is not valid.", param=where) from None
    if parts.scheme not in _SCHEMES:
        raise InvalidRequestError(
            f"The URL of {where} has the scheme '{parts.scheme[:20]}'; use https, http or data.", param=where
        )
    if not host or parts.username is not None or parts.password is not None:
        raise InvalidRequestError(f"The URL of {where} needs a host and must not carry credentials.", param=where)
    literal = _literal(host)
    if literal is not None and not is_public(literal) and not is_allowed(host, limits):
        raise private_address(where)
    return parts


def is_allowed(host: str, limits: MediaLimits) -> bool:
    """Return whether a host may have addresses of any kind."""
    return host.lower().rstrip(".") in limits.allowed_hosts


def private_address(where: str) -> InvalidRequestError:
    """Return the refusal of a host that is not public. It does not say which address was found."""
    return InvalidRequestError(
        f"The URL of {where} does not lead to public addresses only; send the content as a data: URL.",
        reason="request.media_forbidden",
        param=where,
    )


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
