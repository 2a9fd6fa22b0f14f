"""Images, audio and video: what is taken, what is fetched, what is refused, and how they change KV keys."""

import base64
import ipaddress
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.cards import CheckedFile, ModelRuntimeConfig
from dynamo_core.content import ContentPart
from dynamo_core.enums import Modality, PartKind
from dynamo_core.errors import InvalidRequestError, UnsupportedMediaError
from dynamo_core.requests import GenerateRequest
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes, unpack_tokens
from dynamo_frontend._attempts import routing_request
from dynamo_frontend._media.fetch import CheckedResolver, MediaFetcher
from dynamo_frontend._media.parts import MediaRef
from dynamo_frontend._media.policy import MediaLimits, check_url, is_public
from dynamo_frontend._media.source import block_media, content_hash, place_parts

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 50
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


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


# --- KV keys


def test_media_count_to_the_block_of_their_placeholder():
    parts = [ContentPart(PartKind.IMAGE, data=bytes([n]), content_hash=n) for n in (7, 8)]
    prompt = pack_tokens([1, 2, 99, 4, 5, 6, 99, 8, 9, 10])
    placed = place_parts(parts, prompt, {"media_placeholders": {"image": 99}})
    assert [part.metadata["token_index"] for part in placed] == [2, 6]
    assert block_media(placed, 4, 2) == [[7], [8]]
    unknown = place_parts(parts, prompt, {})
    assert block_media(unknown, 4, 2) == [[7, 8], []]
    fewer = place_parts(parts, pack_tokens([1, 99, 3, 4]), {"media_placeholders": {"image": 99}})
    assert block_media(fewer, 4, 1) == [[7, 8]]


def test_media_are_part_of_the_routing_question(stack):
    prompt = pack_tokens(range(32))
    part = ContentPart(PartKind.IMAGE, data=PNG, content_hash=content_hash(PNG), metadata={"token_index": 17})
    request = GenerateRequest("r", "tiny", prompt, parts=(part,))
    plain = unpack_hashes(BlockHasher(16).hash_tokens(prompt).local)
    found = unpack_hashes(routing_request(request, stack.card, ()).local_hashes)
    assert found[0] == plain[0]
    assert found[1] != plain[1]
    expected = BlockHasher(16).hash_tokens(prompt, mm_hashes=[[], [content_hash(PNG)]]).local
    assert found == unpack_hashes(expected)


# --- the whole path


@pytest.fixture
async def seer(stack):
    stack.say("A cat.")
    stack.card = msgspec.structs.replace(
        stack.card,
        input_modalities=(Modality.TEXT, Modality.IMAGE, Modality.AUDIO),
        runtime_config=ModelRuntimeConfig(runtime_data={"media_placeholders": {"image": 5}}),
    )
    await stack.start()
    return stack


def image(url=DATA_URL, **fields):
    return {"type": "image_url", "image_url": {"url": url, **fields}}


async def ask(stack, *parts, **fields):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]
    return await stack.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "temperature": 0, **fields})


async def test_inline_media_reach_the_worker(seer):
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"wave").decode(), "format": "wav"}}
    reply = await ask(seer, image(detail="low"), sound)
    assert reply.json["choices"][0]["message"]["content"] == "A cat."
    first, second = seer.script.requests[0].parts
    assert (first.kind, first.data, first.media_type) == (PartKind.IMAGE, PNG, "image/png")
    assert first.content_hash == content_hash(PNG)
    assert first.metadata["detail"] == "low"
    assert (second.kind, second.data, second.media_type) == (PartKind.AUDIO, b"wave", "audio/wav")
    shown = (await seer.get("/metrics")).body.decode()
    assert 'dynamo_frontend_media_items_total{kind="image",outcome="taken"} 1.0' in shown


async def test_a_template_that_reads_parts_gets_them(stack, tmp_path):
    stack.say("A cat.")
    template = tmp_path / "chat_template.jinja"
    template.write_text(
        "{% for m in messages %}{% for part in m['content'] %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    stack.card = msgspec.structs.replace(
        stack.card,
        input_modalities=(Modality.TEXT, Modality.IMAGE),
        files={"chat_template": CheckedFile(str(template))},
    )
    await stack.start()
    assert (await ask(stack, image())).status == 200
    prompt = stack.tokenizer.decode(list(unpack_tokens(stack.script.requests[0].token_ids)), skip_special_tokens=False)
    assert prompt == "What is this?<image>"


async def test_media_survive_a_lost_worker(seer):
    await seer.add_worker(2)
    seer.script.crash_after = 1
    assert (await ask(seer, image())).json["choices"][0]["message"]["content"] == "A cat."
    assert [len(request.parts) for request in seer.script.requests] == [1, 1]


async def test_the_other_apis_take_them_too(seer):
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PNG).decode()}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "?"}]}]
    reply = await seer.post("/v1/messages", {"model": "tiny", "max_tokens": 10, "messages": messages})
    assert reply.status == 200, reply.body
    given = [{"role": "user", "content": [{"type": "input_image", "image_url": DATA_URL}]}]
    reply = await seer.post("/v1/responses", {"model": "tiny", "input": given})
    assert reply.status == 200, reply.body
    assert [request.parts[0].data for request in seer.script.requests] == [PNG, PNG]


@pytest.mark.parametrize(
    ("part", "status", "param"),
    [
        (image("data:image/png;base64,!!"), 400, "image_url"),
        (image("data:image/png;base64,"), 400, "image_url"),
        (image("data:image/png,abc"), 400, "image_url"),
        (image("data:text/html;base64,YQ=="), 415, "image_url"),
        (image("http://127.0.0.1/x.png"), 400, "image_url"),
        (image("http://[::ffff:127.0.0.1]/x.png"), 400, "image_url"),
        (image("http://localhost/x.png"), 400, "image_url"),
        (image("file:///etc/passwd"), 400, "image_url"),
        (image(""), 400, "image_url.url"),
        (image(detail="huge"), 400, "image_url.detail"),
        ({"type": "image_url"}, 400, "image_url.url"),
        ({"type": "video_url", "video_url": {"url": DATA_URL}}, 415, ""),
        ({"type": "input_audio", "input_audio": {"data": "YQ==", "format": "a/b"}}, 400, "input_audio.format"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, 400, "input_audio.data"),
        ({"type": "file", "file": {}}, 415, ""),
    ],
)
async def test_bad_media_are_refused_by_name(seer, part, status, param):
    reply = await ask(seer, part)
    assert reply.status == status, reply.body
    expected = "messages[0].content[1]"
    assert reply.json["error"]["param"] == (f"{expected}.{param}" if param else expected)
    assert seer.script.requests == []


async def test_numbers_and_sizes_are_bounded(stack):
    stack.card = msgspec.structs.replace(stack.card, input_modalities=(Modality.TEXT, Modality.IMAGE))
    await stack.start(media_items=2, media_limit_mb=1)
    assert "more than 2" in (await ask(stack, image(), image(), image())).json["error"]["message"]
    large = "data:image/png;base64," + base64.b64encode(bytes(1100 << 10)).decode()
    assert (await ask(stack, image(large))).json["error"]["code"] == "request.media_too_large"


@pytest.mark.parametrize(("mode", "status"), [("pass", 200), ("refuse", 400)])
async def test_urls_can_be_passed_on_or_refused(stack, mode, status):
    stack.say("A cat.")
    stack.card = msgspec.structs.replace(stack.card, input_modalities=(Modality.TEXT, Modality.IMAGE))
    await stack.start(media_urls=mode)
    reply = await ask(stack, image("https://example.com/cat.png"))
    assert reply.status == status
    if mode == "pass":
        (part,) = stack.script.requests[0].parts
        assert (part.url, part.data) == ("https://example.com/cat.png", b"")
        assert part.content_hash == content_hash(b"https://example.com/cat.png")
        assert (await ask(stack, image("http://10.0.0.1/"))).status == 400
    else:
        assert reply.json["error"]["code"] == "request.media_forbidden"


async def test_fetched_from_an_allowed_host(stack):
    stack.say("A cat.")
    stack.card = msgspec.structs.replace(stack.card, input_modalities=(Modality.TEXT, Modality.IMAGE))
    await stack.start(media_allowed_hosts=["localhost"])
    async with files(picture) as port:
        assert (await ask(stack, image(f"http://localhost:{port}/cat.png"))).status == 200
    assert stack.script.requests[0].parts[0].data == PNG


async def test_models_that_take_text_alone_say_so(stack):
    await stack.start()
    reply = await ask(stack, image())
    assert reply.status == 415
    assert reply.json["error"]["message"] == (
        "messages[0].content[1] has type 'image_url', which this model does not take; send text."
    )
    source = {"type": "url", "url": "https://example.com/a.png"}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    body = {"model": "tiny", "max_tokens": 5, "messages": messages, "system": "s"}
    reply = await stack.post("/v1/messages", body)
    assert reply.status == 415
    assert "messages[0].content[0]" in reply.json["error"]["message"]
