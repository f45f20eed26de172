"""A headless Chromium, driven over the DevTools protocol, for tests of pages. No package is needed for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. Messages are JSON ended by a zero byte, over two pipes (``--remote-debugging-pipe``)."""

    def __init__(self, commands: int, replies: int) -> None:
        self.commands, self.replies = os.fdopen(commands, "wb", 0), os.fdopen(replies, "rb", 0)
        self.buffer, self.count, self.session = b"", 0, ""
        self.problems: list[str] = []
        self.loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            chunk = self.replies.read(1 << 16)
            assert chunk, "Chromium ended"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        found = json.loads(message)
        self._note(found)
        return found

    def _note(self, message: dict[str, Any]) -> None:
        """Keeps whatever a page must not do: exceptions, console messages, requests to anywhere but files."""
        method, inner = message.get("method"), message.get("params", {})
        self.loaded = self.loaded or method == "Page.loadEventFired"
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(inner))
        if method == "Network.requestWillBeSent" and not inner["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(inner["request"]["url"])

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self.count:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Load a file in a window of that many CSS pixels, and wait for it."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.loaded = False
        self.send("Page.navigate", url=path.as_uri())
        while not self.loaded:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of an expression."""
        reply = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def press(self, key: str, text: str) -> None:
        """A key, as from a keyboard."""
        code = {"Enter": 13, " ": 32, "Tab": 9}[key]
        names = {"key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **names)
        self.send("Input.dispatchKeyEvent", type="keyUp", **names)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Chromium with an empty profile, ended afterwards."""
    assert CHROMIUM is not None
    their_commands, commands = os.pipe()
    replies, their_replies = os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = f'exec "$0" {flags} --remote-debugging-pipe "--user-data-dir=$1" 3<&{their_commands} 4>&{their_replies}'
    process = subprocess.Popen(
        ["bash", "-c", command, CHROMIUM, str(profile)],
        pass_fds=(their_commands, their_replies),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_commands)
    os.close(their_replies)
    found = Browser(commands, replies)
    try:
        yield found
    finally:
        found.commands.close()  # Chromium ends with its pipe
        found.replies.close()
        process.terminate()
        process.wait(20)
