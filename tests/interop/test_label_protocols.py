"""The pages of ratings and of steps, in headless Chromium: what was meant is in the file."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.labelling.answers import MARKS
from rlhf_cli.labelling.tasks import Task
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

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.interop
pytest.importorskip("starlette")


def kept(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events-ana.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def with_steps(number: int, steps: list[str]) -> Task:
    return dataclasses.replace(task(number, 1, ("\n".join(steps),)), steps=steps)


@in_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_ratings_marks_and_ranks_by_keys(tmp_path: Path, browser: Any, width: int) -> None:
    """Every mark is pressed once, and each response has a rating of its own."""
    keys, ranks = list(MARKS), [2, 1, 2, 3]
    desks = desks_of(tmp_path, [task(number, 4) for number in range(3)], "instructgpt")
    with served(desks) as server, visited(browser, server.address("ana"), width) as page:
        for number, turn in enumerate(desks["ana"].turns, 1):
            place_is(page, f"Task {number} of 3")
            for place in turn.order:
                assert (
                    page.locator("article:visible pre").inner_text() == (turn.task.responses[place])
                )
                page.keyboard.press("Enter")  # not before it is rated
                page.keyboard.press(str(7 - place))
                for key in keys[3 * place : 3 * place + 3]:
                    page.keyboard.press(key)
                page.keyboard.press("Enter")
            assert page.locator("article:visible").count() == 4
            press(page, ranks, turn.order)
        place_is(page, "Done")
    names = [name for name, _ in MARKS.values()]
    for event in kept(tmp_path):
        assert (event["ratings"], event["ranks"]) == ([7, 6, 5, 4], ranks)
        assert event["marks"] == [names[3 * place : 3 * place + 3] for place in range(4)]


@in_browser
def test_ranking_by_buttons_and_a_keyboard_keeps_the_focus(tmp_path: Path, browser: Any) -> None:
    """As a screen reader presses them: the next one to be pressed has the focus."""
    desks = desks_of(tmp_path, [task(0, 3)])
    with served(desks) as server, visited(browser, server.address("ana")) as page:
        place_is(page, "Task 1 of 1")
        page.locator("article").nth(1).get_by_role("button", name="Next best").focus()
        for _ in range(4):  # 2, then the first that is left: 1, 3, and Save
            page.keyboard.press("Enter")
        place_is(page, "Done")
    ((turn, event),) = desks["ana"].answered
    assert [event["ranks"][place] for place in turn.order] == [2, 1, 3]


@in_browser
def test_ratings_by_mouse_and_a_step_back(tmp_path: Path, browser: Any) -> None:
    desks = desks_of(tmp_path, [task(0, 2)], "instructgpt")
    with served(desks) as server, visited(browser, server.address("ana"), 400) as page:
        place_is(page, "Task 1 of 1")
        assert page.get_by_role("button", name="Next response").is_disabled()
        page.get_by_role("radio", name="3").click()
        page.get_by_role("checkbox", name="harmful advice").click()
        page.get_by_role("button", name="Next response").click()
        page.get_by_role("radio", name="5").click()
        page.get_by_role("button", name="On to ranks").click()
        page.keyboard.press("1")
        page.keyboard.press("u")  # to the ratings: the pick is gone
        assert page.get_by_role("radio", name="5").is_checked()
        page.get_by_role("button", name="Undo").click()
        assert page.get_by_role("checkbox", name="harmful advice").is_checked()
        assert page.locator("#undo").is_disabled()  # nothing is saved yet
        page.get_by_role("checkbox", name="harmful advice").focus()
        page.keyboard.press(" ")
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        page.locator("article").nth(0).get_by_role("button", name="Next best").click()
        page.locator("article").nth(1).get_by_role("button", name="Tie with last").click()
        page.get_by_role("button", name="Save").click()
        place_is(page, "Done")
    ((_, event),) = desks["ana"].answered
    assert event["ratings"] == [3 if place == event["shown"][0] else 5 for place in (0, 1)]
    assert (event["marks"], event["ranks"]) == ([[], []], [1, 1])


@in_browser
def test_the_first_wrong_step(tmp_path: Path, browser: Any) -> None:
    """By digits (12 of two), by arrows, by mouse, and that none is wrong."""
    steps = [f"step {number}" for number in range(1, 13)]
    desks = desks_of(tmp_path, [with_steps(number, steps) for number in range(5)], "steps")
    ways: list[Any] = [["1", "2"], ["ArrowDown", "ArrowDown", "ArrowUp", "ArrowDown"], ["0"], ["3"]]
    with served(desks) as server, visited(browser, server.address("ana"), 400) as page:
        for number, keys in enumerate(ways, 1):
            place_is(page, f"Task {number} of 5")
            page.keyboard.press("Enter")  # nothing is said yet
            for key in keys:
                page.keyboard.press(key)
            page.keyboard.press("Enter")
        place_is(page, "Task 5 of 5")
        page.get_by_role("radio", name="step 7").click()
        page.keyboard.press("ArrowDown")  # of the radio that has the focus
        page.get_by_role("button", name="Save").click()
        place_is(page, "Done")
    assert [event["first_wrong"] for event in kept(tmp_path)] == [12, 2, None, 3, 8]


@in_browser
@pytest.mark.parametrize("protocol", ["rank", "pair", "thumbs", "instructgpt", "steps"])
def test_all_that_can_be_pressed_has_a_name_and_its_turn(
    tmp_path: Path, browser: Any, protocol: str
) -> None:
    """Whoever has a keyboard alone reaches all of it, once each, in the order of the page."""
    asked = task(0, {"thumbs": 1}.get(protocol, 2))
    if protocol == "steps":
        asked = with_steps(0, ["one", "two"])
    with (
        served(desks_of(tmp_path, [asked], protocol)) as server,
        visited(browser, server.address("ana")) as page,
    ):
        place_is(page, "Task 1 of 1")
        names = """() => [...document.querySelectorAll('button, input')]
            .filter(each => each.checkVisibility() && !each.disabled)
            .map(each => (each.closest('label') || each).textContent.trim())"""
        seen = """() => [[...document.querySelectorAll('*')].indexOf(document.activeElement),
            (document.activeElement.closest("label") || document.activeElement)
                .textContent.trim()]"""
        wanted = page.evaluate(names)
        met: list[tuple[int, str]] = []
        page.locator("#help-button").focus()
        for _ in range(60):
            place, name = page.evaluate(seen)
            if met and place <= met[-1][0]:
                break  # round again
            met.append((place, name))
            page.keyboard.press("Tab")
        assert all(wanted)
        radios = page.locator("input[type=radio]").count()  # one of them has the focus for all
        named = [name for _, name in met]
        assert len({*wanted} - {*named}) <= max(0, radios - 1)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0


def test_two_annotators_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    import threading

    tasks = [task(number, 3) for number in range(40)]
    desks = desks_of(tmp_path, tasks, who=("ana", "bob"))

    def work(server: Any, who: str) -> None:
        with client_of(server) as client:
            client.get(f"/?token={server.tokens[who]}")
            turn = client.get("/turn").json()["turn"]
            for number in itertools.count():
                if turn is None:
                    return
                said = {"task": turn["task"], "showing": turn["showing"], "line": "3 1=2"}
                told = client.post("/answer", **posted(server, said)).json()
                if number % 7 == 3:
                    client.post("/undo", **posted(server, {}))
                    told = client.get("/turn").json()
                turn = told["turn"]

    with served(desks) as server:
        threads = [threading.Thread(target=work, args=(server, who)) for who in desks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    again = desks_of(tmp_path, tasks, who=("ana", "bob"))  # as a process that begins reads them
    for desk in again.values():
        assert [turn.task.id for turn, _ in desk.answered] == [turn.task.id for turn in desk.turns]
        assert all(event["annotator"] == desk.who for _, event in desk.answered)
