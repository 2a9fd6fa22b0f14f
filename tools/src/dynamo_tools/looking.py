"""The site as a browser lays it out: nothing wider than the window, no missing picture, a heading on every page.

A page of our own opens each page of the site in a frame, at the width of a desk and of a telephone, and posts what it
measured. That needs a browser and nothing to drive it with.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dynamo_tools.process import clean_environment, tool

BROWSER = "chromium"
WIDTHS = (1280, 390)
LIMIT_S = 300.0
_HARNESS = "/look-at-the-site"
_PAGE = """<!doctype html><title>Looking</title><iframe id="frame" height="2000" style="border:0"></iframe><script>
const pages = PAGES, widths = WIDTHS, frame = document.getElementById("frame"), found = [];
const opened = url => new Promise(resolve => { frame.onload = resolve; frame.src = url; });
const drawn = view => new Promise(resolve => view.requestAnimationFrame(() => view.requestAnimationFrame(resolve)));
async function look(page, width) {
  frame.width = width;
  await opened("/" + page);
  await drawn(frame.contentWindow);
  const doc = frame.contentDocument, say = problem => found.push([page, width, problem]);
  const root = doc.documentElement;
  if (root.scrollWidth > width + 1) say(`is ${root.scrollWidth} pixels wide`);
  for (const image of doc.images) if (!image.complete || !image.naturalWidth) say(`does not show ${image.src}`);
  const heading = doc.querySelector("h1");
  if (!heading || !heading.getBoundingClientRect().height) say("shows no heading");
}
(async () => {
  for (const page of pages) for (const width of widths)
    await look(page, width).catch(error => found.push([page, width, String(error)]));
  await fetch("HARNESS", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


def look(site: Path) -> list[str]:
    """Open every page in a browser; return what is wrong with the layout.

    Args:
        site: Folder with the built pages.

    Raises:
        LookupError: if there is no browser, no page, or the browser does not finish.
    """
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    if not pages:
        raise LookupError(f"{site} has no pages; build them first")
    results: queue.SimpleQueue[list[tuple[str, int, str]]] = queue.SimpleQueue()
    with _served(site, pages, results) as url, _browser(url + _HARNESS) as browser:
        try:
            found = results.get(timeout=LIMIT_S)
        except queue.Empty:
            status = browser.poll()
            raise LookupError(f"{BROWSER} did not look at all pages within {LIMIT_S:g} s (status {status})") from None
    return [f"{page}: {problem} in a window of {width}" for page, width, problem in found]


def photograph(site: Path, folder: Path) -> Iterator[Path]:
    """Write a picture of every page of a site at the width of a desk.

    Raises:
        LookupError: if there is no browser.
    """
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    folder.mkdir(parents=True, exist_ok=True)
    with _served(site, pages, queue.SimpleQueue()) as url:
        for page in pages:
            picture = folder / (page.removesuffix("/index.html").replace("/", "-").removesuffix(".html") + ".png")
            flags = [f"--screenshot={picture}", f"--window-size={WIDTHS[0]},1600"]
            with _browser(f"{url}/{page}", *flags) as browser:
                browser.wait(LIMIT_S)
            yield picture


@contextlib.contextmanager
def _served(site: Path, pages: list[str], results: queue.SimpleQueue[Any]) -> Generator[str]:
    harness = _PAGE.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    handler = partial(_Handler, harness.replace("HARNESS", _HARNESS).encode(), results, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def _browser(url: str, *flags: str) -> Generator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryDirectory(prefix="dynamo-look-", ignore_cleanup_errors=True) as profile:
        # No sandbox: it opens our own pages, and a container's root may not make one.
        usual = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        argv = [tool(BROWSER), *usual, f"--user-data-dir={profile}", *flags, url]
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(argv, env=clean_environment(), stdin=nowhere, stdout=nowhere, stderr=nowhere)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site, the page that looks at it, and takes what that page found."""

    def __init__(self, harness: bytes, results: queue.SimpleQueue[Any], *arguments: Any, directory: str) -> None:
        self._harness, self._results = harness, results
        super().__init__(*arguments, directory=directory)

    def do_GET(self) -> None:
        if self.path != _HARNESS:
            super().do_GET()
            return
        self.send_response(http.HTTPStatus.OK)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(self._harness)))
        self.end_headers()
        self.wfile.write(self._harness)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(http.HTTPStatus.NO_CONTENT)
        self.end_headers()
        self._results.put(json.loads(body))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""
