"""Images, audio and video: what is taken, what is refused, and how they change KV keys."""

import base64

import msgspec
import pytest
from aiohttp import web

from dynamo_core.cards import CheckedFile, ModelRuntimeConfig
from dynamo_core.content import ContentPart
from dynamo_core.enums import Modality, PartKind
from dynamo_core.requests import GenerateRequest
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes, unpack_tokens
from dynamo_frontend._attempts import routing_request
from dynamo_frontend._media.source import block_media, content_hash, place_parts

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 50
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


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


async def picture(request):
    return web.Response(body=PNG, content_type="image/png")


async def test_fetched_from_an_allowed_host(stack):
    stack.say("A cat.")
    stack.card = msgspec.structs.replace(stack.card, input_modalities=(Modality.TEXT, Modality.IMAGE))
    await stack.start(media_allowed_hosts=["localhost"])
    app = web.Application()
    app.router.add_get("/cat.png", picture)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        assert (await ask(stack, image(f"http://localhost:{port}/cat.png"))).status == 200
    finally:
        await runner.cleanup()
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
