"""The pages of label by keyboard and by ear: what a screen reader is told, and where the focus is.

Its words are those of the accessibility tree of Chromium; no screen reader runs here.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.interop.browser import faint
from tests.interop.label_pages import (
    browser,
    desks_of,
    in_browser,
    place_is,
    served,
    serving,
    task,
    visited,
)
from tests.interop.test_label_protocols import with_steps

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.interop, in_browser]
pytest.importorskip("starlette")

SNAPSHOTS = {
    "rank": """
        - banner:
          - heading "Task 1 of 2" [level=1]
          - progressbar "tasks labelled"
          - button "Help"
        - main:
          - heading "Prompt" [level=2]
          - text: prompt 0
          - heading "Responses" [level=2]
          - article "Response 1":
            - heading "Response 1" [level=3]
            - button "Next best Response 1"
            - button "Tie with last Response 1" [disabled]
            - group "Response 1"
          - article "Response 2"
        - contentinfo:
          - status
          - paragraph: "Best first: press the number of the best one"
          - group "answers":
            - button "Save" [disabled]
            - button "Take back" [disabled]
          - group "about this task":
            - button "Undo" [disabled]
            - button "Skip"
            - button "Flag"
            - button "Note"
        """,
    "pair": """
        - main:
          - article "Response A"
          - article "Response B"
        - contentinfo:
          - group "answers":
            - group "A is better:":
              - 'button "A is better: much"'
              - 'button "A is better: clearly"'
              - 'button "A is better: somewhat"'
              - 'button "A is better: slightly"'
            - group "neither":
              - button "Tie"
              - button "Both bad"
            - group "B is better:":
              - 'button "B is better: slightly"'
        """,
    "thumbs": """
        - main:
          - article "Response"
        - contentinfo:
          - group "answers":
            - button "Good"
            - button "Bad"
        """,
    "instructgpt": """
        - main:
          - heading "Response 1 of 2, to be rated" [level=2]
          - article "Response 1"
          - group "Overall quality, from 1 (worst) to 7 (best)":
            - radio "1"
          - group "What holds of it":
            - checkbox "fails to follow the instruction or task"
        - contentinfo:
          - group "answers":
            - button "Next response" [disabled]
        """,
    "steps": """
        - main:
          - article "Response":
            - group "Which step is the first wrong one?":
              - 'radio "0 none: all of it is right"'
              - radio "1 one"
              - radio "2 two"
        - contentinfo:
          - group "answers":
            - button "Save" [disabled]
        """,
}
SMALL = """() => [...document.querySelectorAll("button, input")]
    .map((each) => each.closest("label") || each)
    .filter((each) => each.checkVisibility())
    .filter((each) => Math.min(each.offsetWidth, each.offsetHeight) < 24)
    .map((each) => each.textContent)"""
ALL_SCROLLS = """() => [document.scrollingElement.scrollHeight > innerHeight,
    document.scrollingElement.scrollWidth <= innerWidth,
    getComputedStyle(document.querySelector("main")).overflowY]"""


def tasks_of(protocol: str) -> list[Any]:
    """Two tasks."""
    if protocol == "steps":
        return [with_steps(number, ["one", "two"]) for number in range(2)]
    return [task(number, 1 if protocol == "thumbs" else 2) for number in range(2)]


def says(page: Any, text: str) -> None:
    """Wait until that is what is spoken."""
    script = "text => document.querySelector('[role=status]').textContent === text"
    page.wait_for_function(script, arg=text, timeout=5000)


def focus(page: Any) -> str:
    """The role and the name of what has the focus."""
    first: str = page.locator(":focus").aria_snapshot().splitlines()[0]
    return first.removeprefix("- ").removesuffix(":")


def hints(page: Any) -> set[str]:
    """What buttons say of their keys, to be seen and to be heard."""
    script = """() => [...document.querySelectorAll("button")]
        .filter((each) => each.checkVisibility())
        .map((each) => [getComputedStyle(each, "::after").content, each.ariaKeyShortcuts])"""
    found = page.evaluate(script)
    assert all(seen == (f'"{heard}" / ""' if heard else "none") for seen, heard in found)
    return {seen for seen, _ in found}


@pytest.mark.parametrize("protocol", SNAPSHOTS)
def test_what_is_on_the_page_is_named_seen_and_large(
    tmp_path: Path, browser: Any, protocol: str
) -> None:
    from playwright.sync_api import expect

    desks = desks_of(tmp_path, tasks_of(protocol), protocol)
    with (
        served(desks, "Be kind.") as server,
        visited(browser, server.address("ana"), 400) as page,
    ):
        place_is(page, "Task 1 of 2")
        expect(page.locator("body")).to_match_aria_snapshot(SNAPSHOTS[protocol])
        assert focus(page) == 'heading "Prompt" [level=2]'
        page.keyboard.press("1")  # a pick, a rating, a step; of a pair an answer
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert faint(page) == [] and page.evaluate(SMALL) == []
        page.set_viewport_size({"width": 320, "height": 256})  # 1280 by 1024, four times as large
        assert page.evaluate(ALL_SCROLLS) == [True, True, "visible"]
        page.get_by_role("button", name="Help").click()
        assert focus(page) == 'heading "Help" [level=2]'
        assert faint(page) == [] and page.evaluate(SMALL) == []


def test_ranks_are_spoken(tmp_path: Path, browser: Any) -> None:
    """Which response, its rank, ties, what was taken back, how far it is, that it was not saved."""
    desks = desks_of(tmp_path, [task(0, 3), task(1, 2)])
    with served(desks) as server, visited(browser, server.address("ana")) as page:
        place_is(page, "Task 1 of 2")
        for key, spoken in (
            ("=", "rank one first, then the next can tie with it"),
            ("2", "Response 2 has rank 1. 2 left"),
            ("2", "response 2 is ranked already"),
            ("2", "response 2 is ranked already\u00a0"),  # so that it is spoken again
            ("=", "The next one ties with 2"),
            ("Backspace", "The next one does not tie"),
            ("=", "The next one ties with 2"),
            ("3", "Response 3 has rank 1, tied with 2. 1 left"),
            ("Enter", "rank all of them first, 1 left"),
            ("Backspace", "Response 3 has no rank. 2 left"),
            ("1", "Response 1 has rank 2. 1 left"),
            ("=", "The next one ties with 1"),
            ("3", "Response 3 has rank 2, tied with 1. All are ranked, Enter saves"),
        ):
            page.keyboard.press(key)
            says(page, spoken)
            assert focus(page) == 'heading "Prompt" [level=2]'
        seen = page.locator("#message").evaluate("each => getComputedStyle(each).position")
        assert seen == "absolute" and "2 > 1 = 3" in page.locator("#picked").inner_text()

        page.keyboard.press("Enter")
        says(page, "Saved: 2, then 1 and 3 tied. Task 2 of 2")
        assert focus(page) == 'heading "Prompt" [level=2]'
        page.keyboard.press("u")
        says(page, "Taken back. Task 1 of 2")
        page.keyboard.press("s")
        assert focus(page) == 'textbox "Why skip this? (may stay empty)"'
        page.keyboard.press("Enter")
        says(page, "Saved: skipped. Task 2 of 2")
        page.keyboard.press("2")
        page.keyboard.press("1")
        page.evaluate("[kept, fetch] = [fetch, async () => { throw new TypeError() }]")
        page.keyboard.press("Enter")
        says(page, "Not saved: the server does not answer: run the same command again")
        page.evaluate("void (fetch = kept)")
        page.keyboard.press("Enter")
        says(page, "Saved: 2, then 1. All 2 tasks are labelled. You can still undo.")
        assert focus(page).startswith("paragraph: All 2 tasks are labelled.")
        page.get_by_role("button", name="Finish and seal").press("Enter")
        place_is(page, "Sealed")
        assert focus(page) == "paragraph: Sealed. You may close this page."


@pytest.mark.parametrize(
    ("protocol", "steps"),
    [
        (
            "pair",
            [
                ("2", "Saved: A is clearly better. Task 2 of 2", 'heading "Prompt" [level=2]'),
                ("u", "Taken back. Task 1 of 2", 'heading "Prompt" [level=2]'),
                ("6", "Saved: both bad. Task 2 of 2", 'heading "Prompt" [level=2]'),
            ],
        ),
        ("thumbs", [("n", "Saved: bad. Task 2 of 2", 'heading "Prompt" [level=2]')]),
        (
            "instructgpt",
            [
                ("Enter", "rate it from 1 to 7 first", 'heading "Prompt" [level=2]'),
                ("3", "Rated 3 of 7", 'heading "Prompt" [level=2]'),
                ("h", "hallucination: marked", 'heading "Prompt" [level=2]'),
                ("h", "hallucination: not marked", 'heading "Prompt" [level=2]'),
                ("Enter", "", 'heading "Response 2 of 2, to be rated" [level=2]'),
                ("u", "", 'heading "Response 1 of 2, to be rated" [level=2]'),
                ("Enter", "", 'heading "Response 2 of 2, to be rated" [level=2]'),
                ("7", "Rated 7 of 7", 'heading "Response 2 of 2, to be rated" [level=2]'),
                ("Enter", "", 'heading "Responses, to be ranked" [level=2]'),
            ],
        ),
        (
            "steps",
            [
                ("ArrowDown", "Step 1 is the first wrong one", 'heading "Prompt" [level=2]'),
                ("0", "No step is wrong", 'heading "Prompt" [level=2]'),
                ("Enter", "Saved: No step is wrong. Task 2 of 2", 'heading "Prompt" [level=2]'),
            ],
        ),
    ],
)
def test_keys_of_other_protocols_are_spoken(
    tmp_path: Path, browser: Any, protocol: str, steps: list[tuple[str, str, str]]
) -> None:
    desks = desks_of(tmp_path, tasks_of(protocol), protocol)
    with served(desks) as server, visited(browser, server.address("ana")) as page:
        place_is(page, "Task 1 of 2")
        for key, spoken, focused in steps:
            page.keyboard.press(key)
            says(page, spoken)
            assert focus(page) == focused, key


def test_the_focus_is_never_lost(tmp_path: Path, browser: Any) -> None:
    """Where a key disables or replaces what has it."""
    desks = desks_of(tmp_path, [task(0, 3)])
    with served(desks) as server, visited(browser, server.address("ana")) as page:
        place_is(page, "Task 1 of 1")
        page.keyboard.press("2")
        page.get_by_role("button", name="Take back").focus()
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        says(page, "Response 1 has no rank. 2 left")
        assert focus(page) == 'button "Take back"'
        page.keyboard.press("Enter")
        says(page, "Response 2 has no rank. 3 left")
        assert focus(page).startswith('button "Next best Response 1"')
        page.keyboard.press("1")  # the number of what has it
        assert focus(page).startswith('button "Next best Response 2"')
        page.get_by_role("button", name="Help").press("Enter")
        page.keyboard.press("Escape")
        assert focus(page) == 'button "Help"'


def test_keys_of_a_single_character_can_be_turned_off(tmp_path: Path, browser: Any) -> None:
    """WCAG 2.1.4; the rest goes on by Tab and Enter."""
    desks = desks_of(tmp_path, [task(number, 2) for number in range(2)])
    with served(desks) as server, visited(browser, server.address("ana")) as page:
        place_is(page, "Task 1 of 2")
        assert {'"s" / ""', '"1" / ""', '"Enter" / ""'} <= hints(page)
        page.keyboard.press("?")
        page.get_by_role("checkbox", name="Keys of a single character").press(" ")
        page.keyboard.press("Escape")
        for key in "1=suf?":
            page.keyboard.press(key)
        assert page.locator("dialog[open]").count() == 0
        assert page.locator("#message").text_content() == ""
        assert {"none", '"Enter" / ""'} == hints(page) - {'"Backspace" / ""'}
        page.reload()
        place_is(page, "Task 1 of 2")
        page.get_by_role("button", name="Next best Response 2").press("Enter")
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")  # Save has the focus
        says(page, "Saved: 2, then 1. Task 2 of 2")
        page.get_by_role("button", name="Help").press("Enter")
        page.get_by_role("checkbox", name="Keys of a single character").press(" ")
        page.keyboard.press("Escape")
        page.keyboard.press("1")
        says(page, "Response 1 has rank 1. 1 left")


def test_a_review_by_ear(tmp_path: Path, browser: Any) -> None:
    from rlhf_cli.labelling.review import Review

    desks = desks_of(tmp_path, [task(0, 2), task(1, 2)], "pair", ("ana", "bob"))
    for ranks, desk in zip(([1, 2], [2, 1]), desks.values(), strict=True):
        for turn in desk.turns:
            desk.answer(turn, {"kind": "pair", "ranks": ranks, "strength": 2, "both_bad": False})
    with (
        serving(lambda port: Review(desks, port, lambda: None)) as server,
        visited(browser, server.address("review"), 400) as page,
    ):
        place_is(page, "2 tasks to review")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert faint(page) == [] and page.evaluate(SMALL) == []
        heads = page.get_by_role("region", name="Task 1").get_by_role("columnheader")
        assert heads.all_inner_texts() == ["who", "answer", "note", "settle"]
        page.get_by_role("button", name="take what bob says").first.press("Enter")
        says(page, "Saved: task 1 of 2")
        assert focus(page) == 'button "take what ana says": Take'
        assert page.locator("section:focus-within").get_by_role("heading", name="Task 2").count()
        page.get_by_role("textbox").nth(1).fill("5")
        page.get_by_role("button", name="Save Task 2").press("Enter")
        says(page, "Saved: task 2 of 2")
        page.get_by_role("button", name="Finish and seal").press("Enter")
        place_is(page, "Finished")
        assert focus(page) == "paragraph: Sealed. You may close this page."
