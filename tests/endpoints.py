"""Endpoints with the chat route of OpenAI's API that answer by a function, on purpose badly."""

import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ODD = (
    *(b"<html>busy</html>", b"", b"[]", b'"text"', b"{}", b'{"choices": {}}', b'{"choices": []}'),
    *(b'{"choices": ["text"]}', b'{"choices": [{"message": "text"}]}'),
    b'{"choices": [{"message": {"content": [{"type": "text", "text": "[[A]]"}]}}]}',
    *(b"[" * 50_000, b'{"error": {"message": "busy"}}'),
)
"""What may come with status 200 and is no answer."""

Verdict = Callable[[str, str], float | None]
"""Log-odds that the first of two is better; None is a fault of the server."""


class FakeEndpoint(ThreadingHTTPServer):
    """Answers a message by a function that gives a choice, or all that is sent; it counts what it
    is asked.
    """

    def __init__(self, choose: Callable[[str], dict[str, Any] | bytes | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.choose = choose
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most = 0
        self.status = 400  # of what it does not answer
        self.guard = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class FakeJudge(FakeEndpoint):
    """One that goes by a function of both responses."""

    def __init__(self, verdict: Verdict, in_words: bool = False) -> None:
        def choose(text: str) -> dict[str, Any] | None:
            first, rest = text.split("Response A:\n")[1].split("\n\nResponse B:\n")
            odds = verdict(first, rest.split("\n\nAnswer with")[0])
            return None if odds is None else verdict_as_choice(odds, in_words)

        super().__init__(choose)


def verdict_as_choice(odds: float, in_words: bool) -> dict[str, Any]:
    """What an endpoint answers who thinks that the first is better by so much."""
    choice: dict[str, Any] = {"message": {"content": f"I say [[{'A' if odds > 0 else 'B'}]]"}}
    if not in_words:
        p = 1 / (1 + math.exp(-odds))
        tokens = [{"token": "A", "logprob": math.log(p)}]
        tokens += [{"token": " B", "logprob": math.log(1 - p)}]
        choice["logprobs"] = {"content": [{"token": "A", "top_logprobs": tokens}]}
    return choice


class _Handler(BaseHTTPRequestHandler):
    server: FakeEndpoint

    def do_POST(self) -> None:
        server = self.server
        with server.guard:
            server.at_once += 1
            server.most = max(server.most, server.at_once)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = server.choose(body["messages"][0]["content"])
        with server.guard:
            server.at_once -= 1
            server.asked.append(body)
            server.keys.add(self.headers["Authorization"])
        if choice is None or self.path != "/v1/chat/completions":
            self.send_error(server.status, "no such luck")
            return
        usage = {"prompt_tokens": 100, "completion_tokens": 2}
        content = choice
        if not isinstance(content, bytes):
            content = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass
