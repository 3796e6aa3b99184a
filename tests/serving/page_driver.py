"""Chromium without a window, driven by the Chrome DevTools protocol.

Of a browser's drivers this is the smallest: one websocket, and the browser that is on
the machine. It types keys and drops files as a person does, and reads the
accessibility tree.
"""

import base64
import collections
import contextlib
import http.client
import json
import shutil
import subprocess
import time
from pathlib import Path

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # it cannot start as root in a container otherwise
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
]
# name: key code, and what it types
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, ""), " ": (32, " ")}
KEYS |= {"ArrowLeft": (37, ""), "ArrowRight": (39, "")}
CONTROL = 2  # the modifier of a key

SECONDS = 60  # for an answer of a small model on a busy machine


class Browser:
    """A browser process; `open` gives a page with a profile of its own."""

    def __init__(self, folder: Path):
        port_file = folder / "DevToolsActivePort"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=null, stderr=null)
        wait_until(
            lambda: port_file.exists() and port_file.read_text().count("\n") == 1
        )
        self.port = int(port_file.read_text().split()[0])

    def open(self, url: str) -> "Page":
        return Page(self.port, url)

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=20)


class Page:
    """One page. It keeps the console's errors and the address of each request."""

    def __init__(self, port: int, url: str):
        http_ = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        http_.request("GET", "/json/version")
        address = json.loads(http_.getresponse().read())["webSocketDebuggerUrl"]
        self.stack = contextlib.ExitStack()
        self.socket = self.stack.enter_context(
            connect(address, max_size=None, proxy=None)
        )
        self.number = 0
        self.session = None
        self.answers = {}
        self.problems = []
        self.requests = []
        self.refusals = []  # (part of an address, status, headers, body) to answer with
        self.context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call(
            "Target.createTarget", url="about:blank", browserContextId=self.context
        )
        self.session = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Fetch.enable", patterns=[{"urlPattern": "*"}])
        self.resize(1280, 900)
        self.go(url)

    # The protocol

    def send(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        return self.number

    def call(self, method, **params):
        """Sends a command and returns its result; events before it are taken, too."""
        number = self.send(method, **params)
        while number not in self.answers:
            self.take(SECONDS)
        answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def take(self, seconds):
        """Takes one message, if one comes in time."""
        try:
            message = json.loads(self.socket.recv(timeout=seconds))
        except TimeoutError:
            return
        if "id" in message:
            self.answers[message["id"]] = message
        else:
            self.note(message["method"], message["params"])

    def note(self, event, params):
        if event == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "warning",
        ):
            self.problems.append(str(params["args"]))
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self.problems.append(f"{entry['text']} {entry.get('url')}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Fetch.requestPaused":
            self.let_pass(params)

    def let_pass(self, params):
        for refusal in self.refusals:
            part, status, headers, body = refusal
            if part in params["request"]["url"]:
                self.refusals.remove(refusal)
                headers = {"Content-Type": "application/json", **headers}
                self.send(
                    "Fetch.fulfillRequest",
                    requestId=params["requestId"],
                    responseCode=status,
                    responseHeaders=[
                        {"name": name, "value": value}
                        for name, value in headers.items()
                    ],
                    body=base64.b64encode(json.dumps(body).encode()).decode(),
                )
                return
        self.send("Fetch.continueRequest", requestId=params["requestId"])

    # What a person does

    def go(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script):
        """Returns the value of an expression in the page; promises are awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details["exception"].get("description", details["text"]))
        return result["result"].get("value")

    def until(self, script, seconds=SECONDS):
        """Waits until an expression is true, as JavaScript sees it."""
        wait_until(lambda: self.run(f"Boolean({script})"), seconds, script)

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector):
        box = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'});"
            "const b = node.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        where = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **where)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **where)

    def press(self, key, modifiers=0):
        code, text = KEYS[key]
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = "" if modifiers & CONTROL else text
        down = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=down, text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def tab_to(self, selector, limit=60):
        """Presses Tab until an element has the focus, `limit` times at most."""
        for _ in range(limit):
            self.press("Tab")
            if self.run(f"document.activeElement.matches({json.dumps(selector)})"):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    def choose_file(self, selector, path):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drop_file(self, selector, path):
        x, y = self.run(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + 20, b.y + 20]; })()"
        )
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    # How the page looks

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, **features):
        """Sets media features: prefer(color_scheme="dark", reduced_motion="reduce")."""
        features = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in features.items()
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path):
        """Saves a picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": 0,
            "width": size["width"],
            "height": size["height"],
            "scale": 1,
        }
        shot = self.call(
            "Page.captureScreenshot", clip=clip, captureBeyondViewport=True
        )
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def tree(self):
        """The accessibility tree's nodes that are shown, as (role, name)."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        value = lambda node, key: node.get(key, {}).get("value", "")
        return [
            (value(node, "role"), value(node, "name"))
            for node in nodes
            if not node["ignored"]
        ]

    def close(self):
        session, self.session = self.session, None
        self.call("Target.detachFromTarget", sessionId=session)
        self.call("Target.disposeBrowserContext", browserContextId=self.context)
        self.stack.close()

    def roles(self):
        """The names of each role."""
        found = collections.defaultdict(list)
        for role, name in self.tree():
            found[role].append(name)
        return found


def wait_until(check, seconds=SECONDS, what="the browser"):
    end = time.monotonic() + seconds
    while not (value := check()):
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s: {what}")
        time.sleep(0.05)
    return value
