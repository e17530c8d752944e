"""Headless Chromium, spoken to by its own protocol; installs it from Debian where it is missing.

python tests/support/chromium.py
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from waiting import LAST, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome")
_APT = (("apt-get", "update"), ("apt-get", "install", "-y", "--no-install-recommends", NAMES[0]))


def find() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    """Install it where it is missing.

    Raises:
        SystemExit: It cannot be installed; says why.
    """
    if find() is not None:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        sys.exit(
            f"the chat page is tested in Chromium, and there is no {', '.join(NAMES)}; install one "
            "(on Debian, as root: apt-get update && apt-get install chromium)"
        )
    for command in _APT:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        ran = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    if find() is None:
        sys.exit("apt-get installed Chromium, and it is not on the PATH")


class Page:
    """A page in a browser without a window."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0

    def call(self, method: str, **params: Any) -> Any:
        """The result of a method of the DevTools protocol."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(LAST))
            if told.get("id") == self._number:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]

    def value(self, script: str) -> Any:
        """Return the value of an expression of JavaScript, or of its promise."""
        told = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def open(self, url: str) -> None:
        """Go to an address, from which nothing of the page before is left."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        wait_until(lambda: self.value("document.readyState") == "complete", url)
        wait_until(lambda: self.value("location.href") == url, url)

    def wait(self, script: str) -> None:
        """Return as soon as an expression is true."""
        wait_until(lambda: self.value(f"Boolean({script})"), script)

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file as in the browser's dialogue."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drop_file(self, selector: str, path: Path) -> None:
        """Drag a file from outside onto an element."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.value(f"[{box}.x + 5, {box}.y + 5]")
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def type(self, selector: str, text: str) -> None:
        """Type a line and Enter."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def picture(self, path: Path) -> None:
        """Save what is to be seen, as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def chromium(folder: Path, width: int = 820, height: int = 560) -> Iterator[Page]:
    """A page of a browser that keeps its things in a folder."""
    from websockets.sync.client import connect

    program = find()
    assert program is not None, "no Chromium: run python tests/support/chromium.py"
    log, told = folder / "log", folder / "profile" / "DevToolsActivePort"
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-dev-shm-usage", "--disable-background-networking", "--no-proxy-server"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--remote-debugging-port=0", "about:blank"], stdout=file, stderr=file
        )
    try:
        wait_until(lambda: process.poll() is not None or told.exists(), "Chromium")
        assert process.poll() is None, log.read_text()
        wait_until(lambda: "\n" in told.read_text(), "the port of Chromium")
        address = f"http://127.0.0.1:{told.read_text().split()[0]}/json/list"
        with build_opener(ProxyHandler({})).open(address, timeout=LAST) as answer:
            listed = json.load(answer)
        (page,) = [one for one in listed if one["type"] == "page"]
        with connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(LAST)


if __name__ == "__main__":
    install()
