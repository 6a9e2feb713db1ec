"""A page of another origin, in a real Chromium, gets nothing from this clone's Prefect server; its own UIs work.

`make check-browser` runs it (Debian's package `chromium`): a server of a temporary folder, and a second one from which
Chromium opens a page that tries all that pages can: fetches of every kind, forms, scripts, images, websockets.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from websockets.sync.client import connect
from websockets.sync.connection import Connection

from tests.clone import ROOT, Clone

_SECONDS = 120
_SHOWN = "shown-in-the-ui"
_PAGE = """<!doctype html><body><script>
const api = "%s/api", results = {};
const body = JSON.stringify({name: "evil"});
async function attempt(name, work) {
  try { results[name] = await Promise.race([work(), new Promise(r => setTimeout(r, 5000, "silence"))]); }
  catch (error) { results[name] = "refused"; }
}
const json = {"Content-Type": "application/json"};
const post = (mode, headers, content) => async () => {
  const reply = await fetch(api + "/flows/", {method: "POST", mode, headers, body: content});
  return reply.type == "opaque" ? "unread" : "read"; };
const load = (tag, attribute, path) => () => new Promise(done => {
  const element = document.createElement(tag);
  element.onload = () => done("read"); element.onerror = () => done("refused");
  element[attribute] = api + path; document.body.append(element); });
const socket = path => () => new Promise(done => {
  const opened = new WebSocket(api.replace("http", "ws") + path, ["prefect"]);
  opened.onopen = () => done("read"); opened.onerror = () => done("refused"); });
const form = type => () => new Promise(done => {
  const frame = document.createElement("iframe"); frame.name = type; document.body.append(frame);
  const sent = document.createElement("form"); sent.method = "POST"; sent.enctype = type;
  sent.target = type; sent.action = api + "/flows/";
  const field = document.createElement("input"); field.name = '{"name": "evil", "x": "'; field.value = '"}';
  sent.append(field); document.body.append(sent); frame.onload = () => done("unread"); sent.submit(); });
(async () => {
  await attempt("GET", async () => (await fetch(api + "/health")).ok ? "read" : "answered");
  await attempt("token", async () => (await fetch(api + "/csrf-token?client=x")).ok ? "read" : "answered");
  await attempt("POST json", post("cors", json, body));
  await attempt("POST text", post("no-cors", {"Content-Type": "text/plain"}, body));
  await attempt("POST untyped", post("no-cors", {}, new Blob([body])));
  await attempt("PATCH", async () =>
    (await fetch(api + "/flows/x", {method: "PATCH", headers: json, body})).ok ? "read" : "answered");
  for (const type of ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded"])
    await attempt("form " + type, form(type));
  await attempt("script", load("script", "src", "/health"));
  await attempt("image", load("img", "src", "/static/prefect-logo-mark-gradient.png"));
  await attempt("events", socket("/events/out"));
  await attempt("logs", socket("/logs/out"));
  await fetch("/results", {method: "POST", body: JSON.stringify(results)});
  document.title = "done";
})();
</script>"""
_READS = ("GET", "token", "POST json", "PATCH", "script", "image", "events", "logs")
_BLIND = ("POST text", "POST untyped", *(f"form {kind}" for kind in ("text/plain", "multipart/form-data")))
_URL_FORM = "form application/x-www-form-urlencoded"


@contextmanager
def _foreign_site(prefect: str, results: list[dict[str, str]]) -> Iterator[int]:
    """Serve the page on a port of its own; yield the port."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply((_PAGE % prefect).encode())

        def do_POST(self) -> None:
            results.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._reply(b"")

        def _reply(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield site.server_port
        site.shutdown()


class _Browser:
    """A headless Chromium, driven by its own protocol."""

    def __init__(self, chromium: str, profile: str) -> None:
        self._process = subprocess.Popen(
            [
                *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run"),
                *("--host-resolver-rules=MAP rebound.example 127.0.0.1", "--remote-allow-origins=*"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        record = Path(profile, "DevToolsActivePort")
        _until(lambda: record.is_file() and "\n" in record.read_text(), "the browser starts")
        self._port = record.read_text().split()[0]

    def __enter__(self) -> "_Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def until(self, url: str, condition: str) -> str:
        """Open a page, wait until a JavaScript condition holds; return the text of the page."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new?{quote(url, safe='')}", method="PUT")
        with urllib.request.urlopen(request) as reply:
            tab = json.load(reply)["webSocketDebuggerUrl"]
        with connect(tab, proxy=None, max_size=None) as page:
            _until(lambda: _evaluated(page, condition) is True, f"{condition} in {url}")
            return str(_evaluated(page, "document.documentElement.innerText"))


def _evaluated(page: Connection, expression: str) -> Any:
    page.send(json.dumps({"id": 1, "method": "Runtime.evaluate", "params": {"expression": expression}}))
    while (reply := json.loads(page.recv(_SECONDS))).get("id") != 1:
        pass
    return reply.get("result", {}).get("result", {}).get("value")


def _until(is_so: Callable[[], bool], event: str) -> None:
    end = time.monotonic() + _SECONDS
    while not is_so():
        if time.monotonic() > end:
            sys.exit(f"waited in vain until {event}")
        time.sleep(0.3)


class _Api:
    """A client of the server as programs of this machine are, with a token."""

    def __init__(self, address: str) -> None:
        self._api = f"{address}/api"
        self._token = self.ask("/csrf-token?client=check")["token"]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if body is not None:
            headers |= {"Prefect-Csrf-Token": self._token, "Prefect-Csrf-Client": "check"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self._api}{path}", data, headers)) as reply:
            return json.load(reply)


def check(browser: _Browser, address: str) -> None:
    """Open the pages and compare what they got; AssertionError if that is more than nothing."""
    api = _Api(address)
    api.ask("/flows/", {"name": _SHOWN})
    results: list[dict[str, str]] = []
    with _foreign_site(address, results) as port:
        for name in ("127.0.0.1", "localhost"):
            browser.until(f"http://{name}:{port}/", "document.title == 'done'")
            (got,) = results
            results.clear()
            sys.stdout.write(f"a page of http://{name}:{port} got: {json.dumps(got)}\n")
            assert got.keys() == {*_READS, *_BLIND, _URL_FORM}
            assert {got[name] for name in _READS} == {"refused"}
            assert "read" not in got.values()  # what is sent blindly changes nothing, as the flows show
    assert [flow["name"] for flow in api.ask("/flows/filter", {})] == [_SHOWN]
    rebound = f"{address.replace('127.0.0.1', 'rebound.example')}/api/health"
    assert "Host is rebound.example" in browser.until(rebound, "document.readyState == 'complete'")
    for origin in (address, address.replace("127.0.0.1", "localhost")):
        for ui in ("/flows", "/v2/flows"):
            browser.until(f"{origin}{ui}", f"document.body && document.body.innerText.includes('{_SHOWN}')")
            sys.stdout.write(f"{origin}{ui} shows its flows\n")


def main() -> None:
    """Start a server in a temporary folder, check it, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default="chromium", help="the browser")
    chromium = parser.parse_args().chromium
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as profile:
        clone = Clone(Path(folder), {"PYTHONPATH": str(ROOT)})
        try:
            address = clone.must("flows.server", "start").out.split()[-1]
            with _Browser(chromium, profile) as browser:
                check(browser, address)
        finally:
            clone.must("flows.server", "stop")


if __name__ == "__main__":
    main()
