"""Which URLs of media are fetched, from where, and what comes of them."""

import ipaddress
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.enums import PartKind
from dynamo_core.errors import InvalidRequestError, UnsupportedMediaError
from dynamo_frontend._media.fetch import CheckedResolver, MediaFetcher
from dynamo_frontend._media.parts import MediaRef
from dynamo_frontend._media.policy import MediaLimits, check_url, is_public

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 50


# --- addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_that_are_public(address):
    assert is_public(ipaddress.ip_address(address))


@given(st.integers(0, (1 << 32) - 1))
def test_forms_of_one_address_are_judged_alike(number):
    plain = ipaddress.IPv4Address(number)
    for carried in ((0xFFFF << 32) | number, (0x2002 << 112) | (number << 80), (0x64FF9B << 96) | number):
        assert is_public(ipaddress.IPv6Address(carried)) == is_public(plain)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/x.png",
        "file:///etc/passwd",
        "gopher://example.com",
        "//example.com/x",
        "x",
        "",
        "http://",
        "http://user@example.com/",
        "http://user:word@example.com/",
        "http://example.com:99999/",
        "http://[::1/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:169.254.169.254]/latest",
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1%25eth0]/",
        "https://10.0.0.1:8443/",
        "http://example.com/" + "a" * 9000,
    ],
)
def test_urls_that_are_refused_unseen(url):
    with pytest.raises(InvalidRequestError) as caught:
        check_url(url, "where", MediaLimits())
    assert caught.value.param == "where"


def test_urls_that_may_be_looked_up():
    assert check_url("https://example.com/x.png", "w", MediaLimits()).hostname == "example.com"
    check_url("http://127.0.0.1/", "w", MediaLimits(allowed_hosts={"127.0.0.1"}))


# --- fetching


@asynccontextmanager
async def files(answer):
    """A server on this machine; its URL has a name that the tests' look-up knows."""
    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site._server.sockets[0].getsockname()[1]
    finally:
        await runner.cleanup()


class Names:
    """Look-up of the tests, and how often it was asked."""

    def __init__(self, **known):
        self.known = {name.replace("_", "."): found for name, found in known.items()}
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append(host)
        if host not in self.known:
            raise OSError("unknown")
        found = self.known[host]
        return found.pop(0) if found and isinstance(found[0], list) else found


LOCAL = ["127.0.0.1"]


async def fetch(url, *, names=None, kind=PartKind.IMAGE, **limits):
    limits = {"allowed_hosts": {"media.test"}, "timeout_s": 10.0, **limits}
    fetcher = MediaFetcher(MediaLimits(**limits), names or Names(media_test=LOCAL))
    try:
        return await fetcher.fetch(MediaRef(kind, "where", url=url))
    finally:
        await fetcher.close()


async def picture(request):
    return web.Response(body=PNG, content_type="image/png")


async def test_content_is_fetched_with_its_type():
    async with files(picture) as port:
        assert await fetch(f"http://media.test:{port}/a.png") == (PNG, "image/png")


async def test_names_that_lead_inside_are_refused():
    async with files(picture) as port:
        names = Names(evil_test=LOCAL, mixed_test=["1.1.1.1", "10.0.0.1"], media_test=LOCAL)
        for host in ("evil.test", "mixed.test"):
            with pytest.raises(InvalidRequestError) as caught:
                await fetch(f"http://{host}:{port}/", names=names)
            assert caught.value.reason == "request.media_forbidden"
            assert "127.0.0.1" not in caught.value.message


@pytest.mark.parametrize(
    "target", ["http://evil.test:{port}/", "http://127.0.0.1:{port}/", "http://[::ffff:127.0.0.1]:{port}/"]
)
async def test_redirects_are_checked_again(target):
    served = []

    async def answer(request):
        served.append(request.path)
        if request.path == "/start":
            raise web.HTTPFound(target.format(port=request.url.port))
        return await picture(request)

    async with files(answer) as port:
        names = Names(evil_test=LOCAL, media_test=LOCAL)
        with pytest.raises(InvalidRequestError) as caught:
            await fetch(f"http://media.test:{port}/start", names=names)
        assert caught.value.reason == "request.media_forbidden"
        assert served == ["/start"]


async def test_redirects_within_the_rules_are_followed_up_to_a_limit():
    async def answer(request):
        left = int(request.path[1:])
        if left:
            raise web.HTTPFound(f"/{left - 1}")
        return await picture(request)

    async with files(answer) as port:
        assert (await fetch(f"http://media.test:{port}/3"))[0] == PNG
        with pytest.raises(InvalidRequestError, match="redirects more than 3"):
            await fetch(f"http://media.test:{port}/4")


async def test_a_name_is_looked_up_once_so_it_cannot_change_its_mind():
    async with files(picture) as port:
        names = Names(media_test=[LOCAL, ["10.0.0.1"]])
        await fetch(f"http://media.test:{port}/", names=names)
        assert names.asked == ["media.test"]


async def test_the_resolver_hands_out_what_it_checked():
    names = Names(good_test=["1.1.1.1", "2606:4700::1111"], none_test=[])
    resolver = CheckedResolver(MediaLimits(), names)
    assert [entry["host"] for entry in await resolver.resolve("good.test", 80)] == ["1.1.1.1", "2606:4700::1111"]
    with pytest.raises(OSError, match="no address"):
        await resolver.resolve("none.test", 80)


async def test_size_and_kind_and_status_are_bounded():
    async def answer(request):
        if request.path == "/html":
            return web.Response(text="<html>", content_type="text/html")
        if request.path == "/missing":
            raise web.HTTPNotFound
        if request.path == "/empty":
            return web.Response(body=b"", content_type="image/png")
        response = web.StreamResponse(headers={"content-type": "image/png"})
        if request.path == "/declared":
            response.content_length = 5000
        await response.prepare(request)
        for _ in range(5):
            await response.write(b"x" * 1000)
        return response

    async with files(answer) as port:
        base = f"http://media.test:{port}"
        for path in ("/declared", "/endless"):
            with pytest.raises(InvalidRequestError) as caught:
                await fetch(base + path, max_bytes=2000)
            assert caught.value.reason == "request.media_too_large"
        with pytest.raises(UnsupportedMediaError, match="text/html"):
            await fetch(base + "/html")
        with pytest.raises(InvalidRequestError, match="404"):
            await fetch(base + "/missing")
        with pytest.raises(InvalidRequestError, match="empty"):
            await fetch(base + "/empty")
        with pytest.raises(InvalidRequestError, match="cannot be fetched"):
            await fetch("http://nowhere.test/")


async def test_packed_content_is_not_unpacked():
    async def answer(request):
        assert request.headers["accept-encoding"] == "identity"
        return web.Response(body=b"packed", content_type="image/png", headers={"content-encoding": "gzip"})

    async with files(answer) as port:
        assert (await fetch(f"http://media.test:{port}/"))[0] == b"packed"


async def test_slow_content_runs_out_of_time():
    async def answer(request):
        response = web.StreamResponse(headers={"content-type": "image/png"})
        await response.prepare(request)
        await response.write(b"x")
        await request.content.read()
        while not request.transport.is_closing():
            await response.write(b"x")
        return response

    async with files(answer) as port:
        with pytest.raises(InvalidRequestError, match=r"within 0\.05 s"):
            await fetch(f"http://media.test:{port}/", timeout_s=0.05, max_bytes=1 << 40)
