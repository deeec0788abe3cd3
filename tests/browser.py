"""A real Chromium for tests, without a driver: the DevTools protocol over two pipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def found() -> str | None:
    """The path of one, if there is any."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `events` are what it has said unasked, such as requests and errors."""

    def __init__(self, profile: str, *flags: str):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def as_3_and_4() -> None:  # where it expects them
            kept = os.dup(to_read), os.dup(to_write)
            for fd, wanted in zip(kept, (3, 4), strict=True):
                os.dup2(fd, wanted)

        self._process = subprocess.Popen(
            [found(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             "--no-first-run", "--mute-audio", f"--user-data-dir={profile}", *flags, "about:blank"],
            preexec_fn=as_3_and_4, close_fds=False, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read), os.close(to_write)
        self._count, self._rest, self.events = 0, b"", []
        self._session: str | None = None
        (page,) = (t for t in self.do("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.do("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        asked = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.do("Runtime.evaluate", expression=expression, **asked)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Until the expression is true."""
        poll = f"""new Promise((done, failed) => {{
          const end = performance.now() + {seconds * 1000}, look = () => ({expression}) ? done()
            : performance.now() > end ? failed(Error("waited in vain")) : setTimeout(look, 20);
          look();
        }})"""
        self.js(poll)

    def open(self, url: str, size: tuple[int, int] = (1280, 900)) -> None:
        width, height = size
        shape = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, **shape)
        self.events.clear()
        self.do("Page.navigate", url="about:blank")
        self.do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key of the keyboard."""
        for kind in ("keyDown", "keyUp"):
            named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            more = {"text": text} if text and kind == "keyDown" else {}
            self.do("Input.dispatchKeyEvent", type=kind, **named, **more)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read), os.close(self._write)
