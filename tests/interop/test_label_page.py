"""The page on which people label, in headless Chromium and against whoever has no business there.

What is compared is what was meant with what lies on disk, whatever order was shown.
"""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.interop.label_pages import (
    browser,
    client_of,
    desks_of,
    in_browser,
    place_is,
    posted,
    press,
    served,
    task,
    visited,
)
from tests.labelling.test_label import given

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.interop
starlette = pytest.importorskip("starlette")

EVIL = (
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    "\x1b]0;owned\x07 \u202etxt.exe \ud800",
    "javascript:alert(1) " + "w" * 300 + "\n\ttab",
)


def weak_orders(count: int) -> list[list[int]]:
    ranks = itertools.product(range(1, count + 1), repeat=count)
    return [list(each) for each in ranks if set(each) == set(range(1, max(each) + 1))]


@in_browser
def test_every_ranking_by_keys_is_the_one_in_the_file(tmp_path: Path, browser: Any) -> None:
    """Every pattern of ties of K = 2, 3 and 4, under orders that are drawn."""
    meant = [ranks for count in (2, 3, 4) for ranks in weak_orders(count)]
    tasks = [task(number, len(ranks)) for number, ranks in enumerate(meant)]
    wanted = {each.id: ranks for each, ranks in zip(tasks, meant, strict=True)}
    desks = desks_of(tmp_path, tasks)
    with served(desks) as server, visited(browser, server.address("ana")) as page:
        for number, turn in enumerate(desks["ana"].turns, 1):
            place_is(page, f"Task {number} of {len(tasks)}")
            press(page, wanted[turn.task.id], turn.order)
        place_is(page, "Done")
    kept = [json.loads(line) for line in (tmp_path / "events-ana.jsonl").read_text().splitlines()]
    assert {each["task"]: each["ranks"] for each in kept} == wanted and len(kept) == len(wanted)
    assert len({tuple(each["shown"]) for each in kept}) > 20  # of the 32 orders that there are


@in_browser
def test_mouse_undo_skip_flag_note_reload_and_finish(tmp_path: Path, browser: Any) -> None:
    tasks = [task(number, 3) for number in range(4)]
    desks = desks_of(tmp_path, tasks)
    ana = desks["ana"]
    with served(desks, "Be kind.") as server, visited(browser, server.address("ana")) as page:
        place_is(page, "Task 1 of 4")
        assert page.url.endswith("/") and "token" not in page.url
        cards = page.locator("article")
        cards.nth(1).get_by_role("button", name="Next best").click()
        cards.nth(0).get_by_role("button", name="Tie with last").click()
        page.keyboard.press("Backspace")
        cards.nth(0).get_by_role("button", name="Tie with last").click()
        cards.nth(2).get_by_role("button", name="Next best").click()
        page.keyboard.press("m")
        page.keyboard.type("1 s u?")  # keys do nothing else while text is typed
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Save").click()
        place_is(page, "Task 2 of 4")
        page.keyboard.press("s")
        page.keyboard.type("not mine")
        page.keyboard.press("Enter")
        place_is(page, "Task 3 of 4")
        page.keyboard.press("f")
        page.keyboard.press("Escape")
        page.keyboard.press("Enter")  # nothing is ranked
        page.get_by_text("rank all of them first").wait_for()
        page.reload()
        place_is(page, "Task 3 of 4")
        page.get_by_role("button", name="Undo").click()
        place_is(page, "Task 2 of 4")
        page.keyboard.press("u")
        place_is(page, "Task 1 of 4")
        assert not ana.answered and page.locator("#undo").is_disabled()
        page.keyboard.press("?")
        page.get_by_text("Be kind.").wait_for()
        page.keyboard.press("Escape")
        for number in range(1, 5):
            place_is(page, f"Task {number} of 4")
            press(page, [1, 2, 3], [0, 1, 2])
        place_is(page, "Done")
        page.get_by_role("button", name="Finish and seal").click()
        place_is(page, "Sealed")
    lines = (tmp_path / "events-ana.jsonl").read_text().splitlines()
    first, second, *_ = map(json.loads, lines)
    assert first["note"] == "1 s u?" and first["seconds"] > 0
    order = first["shown"]
    assert [first["ranks"][place] for place in order] == [1, 1, 2]
    assert (second["kind"], second["reason"]) == ("skip", "not mine")
    assert [event["ranks"] for _, event in ana.answered] == [
        [turn.order.index(place) + 1 for place in range(3)] for turn, _ in ana.answered
    ]


@in_browser
@pytest.mark.parametrize(("protocol", "keys"), [("pair", "1234567890"), ("thumbs", "yn")])
def test_pairs_and_thumbs(tmp_path: Path, browser: Any, protocol: str, keys: str) -> None:
    tasks = [task(number, 2 if protocol == "pair" else 1) for number in range(2 * len(keys))]
    desks = desks_of(tmp_path, tasks, protocol)
    with served(desks) as server, visited(browser, server.address("ana")) as page:
        for number, key in enumerate([*keys, *keys], 1):
            place_is(page, f"Task {number} of {len(tasks)}")
            if number <= len(keys):
                page.keyboard.press(key)
            else:
                page.locator(f"#answers button[aria-keyshortcuts='{key}']").click()
        place_is(page, "Done")
    answers = [event for _, event in desks["ana"].answered]
    if protocol == "thumbs":
        assert [event["label"] for event in answers] == [True, False] * 2
        return
    for (turn, event), key in zip(desks["ana"].answered, [*keys, *keys], strict=True):
        better = None if key in "56" else turn.order[0 if key in "1234" else 1]
        assert event["ranks"] == [1 if better in (None, place) else 2 for place in (0, 1)]
        assert event["both_bad"] == (key == "6")
        assert event["strength"] == {**dict(zip("1234", (4, 3, 2, 1), strict=True)), "7": 1}.get(
            key, event["strength"]
        )


@in_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_what_models_write_is_text_and_fits(tmp_path: Path, browser: Any, width: int) -> None:
    desks = desks_of(tmp_path, [task(0, 4, EVIL), task(1, 2, ("x" * 1_000_000, "y\n" * 9999))])
    dark: Any = {"color_scheme": "dark" if width == 400 else "light"}
    with served(desks) as server, visited(browser, server.address("ana"), width, **dark) as page:
        for number in (1, 2):
            place_is(page, f"Task {number} of 2")
            assert page.locator("article img, article script").count() == 0
            assert "owned" not in page.title()
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(wide) == 0
            shown = page.locator("article pre").all_text_contents()
            turn = desks["ana"].current
            assert turn is not None
            if len(shown) == 4:
                assert sorted(shown) == sorted(
                    [*EVIL[:2], r"\x1b]0;owned\x07 \u202etxt.exe \ud800", EVIL[3]]
                )
            press(page, list(range(1, len(shown) + 1)), turn.order)
        place_is(page, "Done")


def test_nobody_else_comes_in_and_nothing_tells_who_wrote_what(tmp_path: Path) -> None:
    desks = desks_of(tmp_path, [task(0, 2)], who=("ana", "bob"))
    with served(desks) as server, client_of(server) as client:
        origin = f"http://127.0.0.1:{server.port}"
        for path in ("/", "/turn", "/label.js", "/label.css", "/?token=x", "/?token=%ff"):
            assert client.get(path).status_code == 403, path
        assert client.get("/", headers={"host": "evil.example"}).status_code == 400
        assert client.get("/", headers={"host": f"evil.example:{server.port}"}).status_code == 400
        entered = client.get(f"/?token={server.tokens['ana']}")
        assert entered.status_code == 303 and entered.headers["location"] == "/"
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert f"label-{server.port}=" in cookie
        told = client.get("/turn")
        assert "default-src 'none'" in told.headers["content-security-policy"]
        assert told.headers["x-content-type-options"] == "nosniff"
        bodies = [client.get(path).text for path in ("/", "/turn", "/label.js", "/label.css")]
        for word in ("secret", "policy0", "0.5", "-3.25", "hidden.jsonl", "bob", str(tmp_path)):
            assert not any(word in body for body in bodies), word
        turn = told.json()["turn"]
        good = {"task": turn["task"], "showing": 0, "line": "1 2"}
        sent = posted(server, good)
        for name, value in (
            *(("origin", "http://evil.example"), ("origin", None), ("x-label", None)),
            *(("content-type", "text/plain"), ("origin", f"http://localhost:{server.port}")),
        ):
            head = {**sent["headers"], name: value}
            head = {key: each for key, each in head.items() if each is not None}
            refused = client.post("/answer", content=sent["content"], headers=head)
            assert refused.status_code == 403, (name, value)
        for bad in ({**good, "line": "1"}, {**good, "line": 3}, {**good, "seconds": -1}, [1]):
            assert client.post("/answer", **posted(server, bad)).status_code == 422
        nested = {**sent, "content": "[" * 50_000}
        assert client.post("/answer", **nested).status_code == 422
        assert (
            client.post("/answer", **posted(server, {**good, "note": "x" * 200_000})).status_code
            == 413
        )
        assert not desks["ana"].answered
        assert client.post("/answer", **sent).status_code == 200
        assert client.post("/answer", **sent).status_code == 409  # of a second tab
        assert len(desks["ana"].answered) == 1 and not desks["bob"].answered
        assert origin in server.address("bob")


def test_a_page_that_was_left_open_for_days_takes_an_answer(tmp_path: Path) -> None:
    desks = desks_of(tmp_path, [task(0, 2)])
    with served(desks) as server, client_of(server) as client:
        client.get(f"/?token={server.tokens['ana']}")
        turn = client.get("/turn").json()["turn"]
        said = {"task": turn["task"], "showing": 0, "line": "1 2", "seconds": 300_000}
        assert client.post("/answer", **posted(server, said)).status_code == 200
    assert [event["seconds"] for _, event in desks["ana"].answered] == [24 * 3600]


def test_a_page_of_responses_that_are_there_needs_no_torch(tmp_path: Path) -> None:
    """So that it is there at once, at the start and where a run goes on."""
    words = [given(tmp_path / "s.jsonl"), "policy=null", "source=page", f"out={tmp_path / 'out'}"]
    command = [sys.executable, "-X", "importtime", "-m", "rlhf_cli", "label", *words]

    def imported() -> set[str]:
        """What a run has imported once its address is there."""
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
            assert run.stderr is not None
            names = set()
            for line in run.stderr:
                names.add(line.rpartition("|")[2].strip())
                if "http://" in line:
                    break
            run.terminate()
        return names

    first, again = imported(), imported()
    assert (tmp_path / "out" / "tasks.jsonl").is_file()
    for names in (first, again):
        assert "uvicorn" in names and not {"torch", "transformers", "datasets"} & names


def test_where_nothing_is_left_nobody_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_cli.labelling import server

    desks = desks_of(tmp_path, [task(0, 2)])
    desks["ana"].answer(desks["ana"].turns[0], {"kind": "skip"})
    server.label(desks, None, False, 0)
    assert "all tasks are labelled" in capsys.readouterr().err


def test_answers_of_the_server_do_not_wait_for_acknowledgements(tmp_path: Path) -> None:
    """Without TCP_NODELAY each takes the 40 ms that the other side may be silent."""
    with served(desks_of(tmp_path, [task(0, 2)])) as server, client_of(server) as client:
        client.get(f"/?token={server.tokens['ana']}")
        took = []
        for _ in range(20):
            began = time.perf_counter()
            client.get("/turn")
            took.append(time.perf_counter() - began)
        assert min(took[1:]) < 0.03


def test_an_answer_is_on_disk_in_milliseconds(tmp_path: Path) -> None:
    desks = desks_of(tmp_path, [task(number, 4) for number in range(50)])
    with served(desks) as server, client_of(server) as client:
        client.get(f"/?token={server.tokens['ana']}")
        turn = client.get("/turn").json()["turn"]
        began = time.monotonic()
        while turn is not None:
            said = {"task": turn["task"], "showing": turn["showing"], "line": "4 3=2 1"}
            turn = client.post("/answer", **posted(server, said)).json()["turn"]
        assert (time.monotonic() - began) / 50 < 0.2
    assert len(desks["ana"].answered) == 50
