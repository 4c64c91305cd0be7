"""A headless Chromium for tests, driven over the WebDriver protocol."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DESKTOP, PHONE = (1280, 900), (360, 740)


def needs_chromium() -> None:
    """Skips the test where Chromium or its driver is missing, and says so."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (apt-get install chromium chromium-driver)")


class Browser:
    """One session of a driver that listens on a port."""

    def __init__(self, port: int, capabilities: dict):
        self.root = f"http://127.0.0.1:{port}"
        self.root += (
            f"/session/{self.call('POST', '/session', {'capabilities': {'alwaysMatch': capabilities}})['sessionId']}"
        )

    def call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, path: Path) -> None:
        self.call("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a script returns in the page."""
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def hover(self, css: str, x: float, y: float) -> None:
        """Moves the pointer to a share of an element's width and height."""
        self.run(f"document.querySelector({css!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(
            f"const b = document.querySelector({css!r}).getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
        )
        move = {"type": "pointerMove", "x": round(box[0] + x * box[2]), "y": round(box[1] + y * box[3]), "duration": 0}
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self.call("POST", "/actions", {"actions": [pointer]})

    def click(self, css: str) -> None:
        self.run(f"document.querySelector({css!r}).click()")

    def errors(self) -> list[str]:
        """What the page has said in the console since the last call, warnings and worse."""
        entries = self.call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        messages = (json.loads(e["message"])["message"] for e in self.call("POST", "/se/log", {"type": "performance"}))
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        """The whole page as a picture."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        body = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": True, "clip": clip}}
        path.write_bytes(base64.b64decode(self.call("POST", "/goog/cdp/execute", body)["data"]))


@contextlib.contextmanager
def browser(size: tuple[int, int], folder: Path, dark: bool = False) -> Iterator[Browser]:
    """A browser whose window has a size in pixels. folder: for what it keeps."""
    with socket.socket() as actual:
        actual.bind(("127.0.0.1", 0))
        port = actual.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run")
    arguments = [f"--{flag}" for flag in flags] + [f"--user-data-dir={folder}", "--disable-dev-shm-usage"]
    arguments += ["--blink-settings=preferredColorScheme=0"] if dark else []
    width, height = size
    options = {
        "args": arguments,
        "mobileEmulation": {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1, "touch": False}},
    }
    logging = {"browser": "ALL", "performance": "ALL"}
    try:
        _wait(port)
        page = Browser(port, {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logging})
        try:
            yield page
        finally:
            page.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(20)


def _wait(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("chromedriver does not answer")
