"""The page for a browser names every path of the API."""

from html.parser import HTMLParser

from dynamo_frontend._openapi import document


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.links.extend(value for name, value in attrs if name == "href")

    def handle_data(self, data):
        self.text += data


async def test_every_path_is_named_and_every_link_leads_somewhere(stack):
    await stack.start()
    reply = await stack.get("/")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/html")
    page = Reader()
    page.feed(reply.body.decode())
    assert all(path in page.text for path in document()["paths"])
    assert len(page.links) > 5
    for link in page.links:
        assert (await stack.get(link)).status == 200, link
