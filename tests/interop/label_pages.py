"""The pages of label on a port of their own, and a browser that looks at them."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.labelling.desk import Desk, Terms
from rlhf_cli.labelling.tasks import Sample, Task, dealt, task_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def task(number: int, count: int, texts: tuple[str, ...] = ()) -> Task:
    said = texts or tuple(f"response {number}.{i}" for i in range(count))
    origins = [
        {"policy": f"secret/policy{i}", "reward": 0.5, "logprob": -3.25} for i in range(count)
    ]
    return task_of(
        [
            Sample(f"prompt {number}", text, "hidden.jsonl:1", origin)
            for text, origin in zip(said, origins, strict=True)
        ]
    )


def desks_of(
    folder: Path, tasks: list[Task], protocol: str = "rank", who: tuple[str, ...] = ("ana",)
) -> dict[str, Desk]:
    terms = Terms(protocol, "page", None)
    turns = dealt(tasks, who, overlap=1.0, repeat=0.0, seed=1)
    return {name: Desk(folder, name, own, terms) for name, own in turns.items()}


@contextmanager
def served(desks: dict[str, Desk], instructions: str | None = None) -> Iterator[Any]:
    """The page on a port of its own, until its finish."""
    from rlhf_cli.labelling.server import Page

    with serving(lambda port: Page(desks, instructions, True, port)) as page:
        yield page


@contextmanager
def serving(make: Callable[[int], Any]) -> Iterator[Any]:
    """A page that is made for a port, until its finish."""
    from rlhf_cli.labelling import gate

    with gate.listening(0) as listener:
        page = make(listener.getsockname()[1])
        thread = threading.Thread(target=lambda: asyncio.run(gate.serve(page, listener)))
        thread.start()
        try:
            yield page
        finally:
            if not page.finished.is_set():
                with client_of(page) as client:
                    client.get(f"/?token={next(iter(page.tokens.values()))}")
                    client.post("/finish", **posted(page, {}))
            thread.join(10)
            assert not thread.is_alive()


def client_of(page: Any) -> Any:
    import httpx2

    return httpx2.Client(base_url=f"http://127.0.0.1:{page.port}")


def posted(page: Any, body: Any) -> dict[str, Any]:
    """What our own page sends."""
    origin = f"http://127.0.0.1:{page.port}"
    head = {"content-type": "application/json", "x-label": "1", "origin": origin}
    return {"content": json.dumps(body), "headers": head}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visited(browser: Any, address: str, width: int = 1000, **options: Any) -> Iterator[Any]:
    """The page in a window; nothing fails, nothing is said on the console, nothing leaves here."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page, faults = context.new_page(), []
    home = address.partition("/?")[0]
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda each: faults.extend([each.url] * (not each.url.startswith(home))))
    page.goto(address)
    yield page
    context.close()
    assert not faults, faults


def place_is(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('h1').textContent === text", arg=text)


def press(page: Any, ranks: list[int], order: list[int]) -> None:
    """Rank what is shown so that the responses of the task get these ranks."""
    for rank in range(1, max(ranks) + 1):
        tied = [number for number, place in enumerate(order, 1) if ranks[place] == rank]
        page.keyboard.press(str(tied[0]))
        for number in tied[1:]:
            page.keyboard.press(" " if number % 2 else "=")
            page.keyboard.press(str(number))
    page.keyboard.press("Enter")
