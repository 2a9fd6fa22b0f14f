"""``GET /``: what is served here, for whoever comes with a browser."""

from __future__ import annotations

import functools
from html import escape

from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openapi import document

HTML = "text/html; charset=utf-8"
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Dynamo frontend</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
td {{ padding: .15rem 1rem .15rem 0; vertical-align: top }}
code {{ font-size: .9rem; overflow-wrap: anywhere }}
</style>
<h1>Dynamo frontend {version}</h1>
<p>Point an OpenAI client at <code>/v1</code> of this address. The schema of everything is
<a href="/openapi.json">/openapi.json</a>, the metrics are <a href="/metrics">/metrics</a>.</p>
<table>
{rows}
</table>
</html>
"""


def index_page(request: HttpRequest, response: HttpResponse) -> None:
    """``GET /``."""
    response.send(200, _page(), HTML)


@functools.cache
def _page() -> bytes:
    described = document()
    rows = [
        _row(method.upper(), path, operation["summary"])
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    return _PAGE.format(version=escape(described["info"]["version"]), rows="\n".join(rows)).encode()


def _row(method: str, path: str, summary: str) -> str:
    name = f"<code>{escape(path)}</code>"
    if method == "GET" and "{" not in path:
        name = f'<a href="{escape(path)}">{name}</a>'
    return f"<tr><td>{method}<td>{name}<td>{escape(summary)}"
