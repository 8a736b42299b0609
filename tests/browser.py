"""Chromium without a window, told what to do through its debugging pipe: JSON values that a zero byte ends."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
# Chromium reads from the file descriptor 3 and writes to 4.
_START = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reads, 3), os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a browser of its own."""

    def __init__(self, folder, width=1000, height=700):
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
        reads, self._out = os.pipe()
        self._in, writes = os.pipe()
        start = [sys.executable, "-c", _START, str(reads), str(writes), *command]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(start, pass_fds=(reads, writes), **nowhere)
        os.close(reads)
        os.close(writes)
        self._number, self._rest, self._session, self.errors = 0, b"", {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Runtime.enable")
        self.size(width, height)

    def call(self, method, **params):
        """The result of one of Chromium's methods."""
        self._number += 1
        os.write(
            self._out,
            json.dumps({"id": self._number, "method": method, "params": params} | self._session).encode() + b"\0",
        )
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._in, 1 << 20)
                assert data, "Chromium has ended"
                self._rest += data
            text, self._rest = self._rest.split(b"\0", 1)
            value = json.loads(text)
            if value.get("id") == self._number:
                assert "error" not in value, value
                return value["result"]
            if value.get("method") == "Runtime.exceptionThrown":
                self.errors.append(value["params"])

    def size(self, width, height):
        """The window's, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def value(self, script):
        """Of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script, seconds=60):
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"{script} in {seconds} s"
            time.sleep(0.05)

    def open(self, address):
        """Goes to a page."""
        self.call("Page.navigate", url=address)
        self.wait(f"location.href.startsWith({address!r}) && document.readyState === 'complete'")

    def type(self, selector, text):
        """Writes into a field and presses Enter."""
        self.value(f"document.querySelector({selector!r}).focus()")
        self.call("Input.insertText", text=text)
        for kind in ({"type": "keyDown", "text": "\r"}, {"type": "keyUp"}):
            self.call("Input.dispatchKeyEvent", key="Enter", code="Enter", windowsVirtualKeyCode=13, **kind)

    def picture(self):
        """The page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(OSError):
            os.close(self._out)
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
