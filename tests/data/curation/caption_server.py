"""A caption server on this machine that fails on demand.

It speaks OpenAI's chat interface. A good answer says what the server saw, `says(shade, prompt)`, so that a test can
tell which picture and which prompt it belongs to.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

TOKENS_IN, TOKENS_OUT = 1000, 50  # of every answer


def says(shade: int, prompt: str) -> str:
    """The good answer to a grey picture of one shade (0-255) and a prompt."""
    return f"a plain wall of shade {round(shade / 10)} asked for with {len(prompt)} letters"


@dataclasses.dataclass(eq=False)
class Seen:
    """A request as it arrived."""

    at_s: float
    headers: dict[str, str]
    body: dict[str, Any]
    picture: Image.Image


Fault = Callable[["Handler", Seen], None]


class CaptionServer(ThreadingHTTPServer):
    """Serves on a free port while inside ``with``. faults: what happens to the first requests, in order of arrival;
    None is answered well, and so is what comes after the list unless ``fault_of`` names a fault for it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *faults: Fault | None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.seen = list(faults), []
        self.lock = threading.Lock()
        self.fault_of: Callable[[Seen], Fault | None] = lambda seen: None
        self.delay_s: Callable[[Seen], float] = lambda seen: 0.0
        self.busy = self.most_busy = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> CaptionServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what the tests provoke."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CaptionServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = body["messages"][0]["content"][1]["image_url"]["url"]
        assert self.path == "/v1/chat/completions"
        assert url.startswith("data:image/jpeg;base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))
        seen = Seen(time.monotonic(), dict(self.headers), body, picture)
        server = self.server
        with server.lock:
            number = len(server.seen)
            server.seen.append(seen)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        fault = server.faults[number] if number < len(server.faults) else server.fault_of(seen)
        time.sleep(server.delay_s(seen))
        with server.lock:
            server.busy -= 1
        if fault:
            fault(self, seen)
        else:
            answer(says(int(np.asarray(picture).mean()), body["messages"][0]["content"][0]["text"]))(
                self, seen
            )

    def send(self, status: int, payload: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        """Quiet."""


def answer(
    text: str | None,
    finish: str = "stop",
    usage: bool = True,
    model: str | None = None,
    refusal: str | None = None,
) -> Fault:
    """A well-formed answer with any content."""

    def fault(handler: Handler, seen: Seen) -> None:
        message = {"role": "assistant", "content": text, "refusal": refusal}
        out = {
            "model": model or seen.body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        }
        if usage:
            out["usage"] = {"prompt_tokens": TOKENS_IN, "completion_tokens": TOKENS_OUT}
        handler.send(200, json.dumps(out).encode())

    return fault


def status(code: int, error: dict | str = "", **headers: str) -> Fault:
    """An error status. error: OpenAI's error object, or plain text; ``{authorization}`` in it is replaced by what the
    client sent, as servers that repeat a wrong key do."""

    def fault(handler: Handler, seen: Seen) -> None:
        text = error if isinstance(error, str) else json.dumps({"error": error})
        text = text.replace("{authorization}", seen.headers.get("Authorization", ""))
        handler.send(code, text.encode(), {name.replace("_", "-"): value for name, value in headers.items()})

    return fault


def raw(payload: bytes) -> Fault:
    """Status 200 with these bytes."""
    return lambda handler, seen: handler.send(200, payload)


def hang(seconds: float) -> Fault:
    """Says nothing for so long, then hangs up."""

    def fault(handler: Handler, seen: Seen) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return fault


def drip(pieces: int, gap_s: float) -> Fault:
    """Begins an answer and sends it byte by byte."""

    def fault(handler: Handler, seen: Seen) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(pieces))
        handler.end_headers()
        for _ in range(pieces):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(gap_s)
        handler.close_connection = True

    return fault


def drop(after: bytes = b"") -> Fault:
    """Closes the connection, before the answer or in the middle of it."""

    def fault(handler: Handler, seen: Seen) -> None:
        if after:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(after) + 100))
            handler.end_headers()
            handler.wfile.write(after)
            handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(2)

    return fault
