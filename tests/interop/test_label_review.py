"""The page on which disagreements are settled: who sees it, what it tells, what it leaves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.labelling.tasks import Task
from tests.interop.label_pages import browser, in_browser, posted, serving, visited
from tests.labelling.test_by_judge import fair, words_for
from tests.labelling.test_label import given, label, read

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.interop
pytest.importorskip("starlette")
WORDS = ["policy=null", "algo.protocol=pair", "source=file", "annotators=[ana,bob]"]


def labelled(folder: Path) -> tuple[Path, list[str]]:
    """A sealed folder of four tasks; ana and bob disagree on the first two."""
    labels = folder / "labels.jsonl"
    words = [given(folder / "s.jsonl", 4, 1), *WORDS, f"labels={labels}"]
    words += ["algo.overlap=1", "algo.repeat=0"]
    with pytest.raises(Exception, match="not there yet"):
        label(folder / "out", *words)
    rows = []
    for number, task in enumerate(read(folder / "out" / "tasks.jsonl")):
        for who in ("ana", "bob"):
            ranks = [2, 1] if who == "bob" and number < 2 else [1, 2]
            rows.append({"task": task["task"], "annotator": who, "ranks": ranks})
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return label(folder / "out", *words), words


def settling(monkeypatch: pytest.MonkeyPatch, *lines: tuple[int, str]) -> list[Any]:
    """Answers that are given on the page, and what it showed before them."""
    shown: list[Any] = []

    async def act(page: Any, listener: Any) -> None:
        import httpx2

        transport = httpx2.ASGITransport(app=page.app)
        base = f"http://127.0.0.1:{page.port}"
        async with httpx2.AsyncClient(transport=transport, base_url=base) as client:
            assert (await client.get("/disagreements")).status_code == 403
            await client.get(f"/?token={page.tokens['review']}")
            shown.append((await client.get("/disagreements")).json())
            for place, line in lines:
                said = {"task": shown[0]["tasks"][place]["task"], "line": line}
                told = await client.post("/review", **posted(page, said))
                shown.append(told.json())
            await client.post("/finish", **posted(page, {}))

    monkeypatch.setattr("rlhf_cli.labelling.review.serve", act)
    return shown


def test_what_is_settled_takes_the_place_of_what_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = labelled(tmp_path)
    sealed, before = (out / "stage.json").read_bytes(), read(out / "preferences.jsonl")
    agreement = json.loads((out / "report.json").read_text())["between_annotators"]
    assert agreement["agreement"] == 0.5

    shown = settling(monkeypatch)  # only looked at
    label(out, *words, "review=true")
    assert (out / "stage.json").read_bytes() == sealed
    tasks = shown[0]["tasks"]
    first, second, *others = tasks
    assert {each["policy"] for each in first["responses"]} == {"x", "y"}
    assert [each["who"] for each in first["answers"]] == ["ana", "bob", "the reward"]
    assert [each["line"] for each in first["answers"][:2]] == ["4", "7"]
    for each in others:  # on these they agree, and the reward does not
        assert each["answers"][0]["line"][0] in "1234" and each["answers"][2]["line"] in "7"

    shown = settling(monkeypatch, (0, "1"), (1, "s both are odd"), (0, "x"))
    label(out, *words, "review=true")
    assert shown[3] == {"fault": "'x' is none of 1 to 9 and 0"}
    assert all(each["reviewed"] for each in shown[2]["tasks"][0]["answers"][:2])
    rows = read(out / "preferences.jsonl")
    assert len(before) == 8 and len(rows) == 6
    (ana, bob) = (row for row in rows if row["task"] == first["task"])
    assert ana["chosen"] == bob["chosen"] and ana["strength"] == 4 and bob["reviewed"]
    report = json.loads((out / "report.json").read_text())
    assert report["between_annotators"] == agreement  # of what they said themselves
    assert report["reviewed"] == 4 and report["skipped"] == 2
    assert [each["skipped"] for each in report["annotators"].values()] == [0, 0]
    events = read(out / "events-bob.jsonl")
    old = [event for event in events if event["task"] == first["task"]]
    assert [event["ranks"] for event in old] == [[2, 1], [1, 2]]
    assert old[1]["supersedes"] == old[0]["saved"]


def test_a_review_that_is_killed_leaves_the_folder_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_cli.config.compose import compose
    from rlhf_cli.config.errors import UserError
    from rlhf_cli.runs.data_checks import check_data

    out, words = labelled(tmp_path)
    shown = settling(monkeypatch, (0, "1"), (9, "1"))  # there is no such task: the page breaks down
    with pytest.raises(IndexError):
        label(out, *words, "review=true")
    assert len(shown) == 2 and not (out / "stage.json").exists()
    with pytest.raises(UserError, match="is labelled still"):
        check_data(compose("dpo", ["data=jsonl", f"data.path={out}"]))
    label(out, *words)
    assert sum(bool(row.get("reviewed")) for row in read(out / "preferences.jsonl")) == 2


def test_what_a_judge_says_otherwise_in_the_other_order_is_settled(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake(lambda a, b: 3.0 if "says 0" in a else fair(a, b))
    words = words_for(server, tmp_path, "algo.protocol=pair")
    samples = tmp_path / "samples.jsonl"
    rows = [{**row, "reward": None} for row in read(samples)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = label(tmp_path / "out", *words)
    shown = settling(monkeypatch, (0, "1"))
    label(out, *words, "review=true")
    (task,) = shown[0]["tasks"]  # the first prompt alone
    assert [(each["who"], each["line"]) for each in task["answers"]] == [("me", "5")]
    (row,) = (row for row in read(out / "preferences.jsonl") if row["task"] == task["task"])
    assert row["reviewed"] and row["p"] == 1
    report = json.loads((out / "report.json").read_text())["judge"]
    assert report["consistency"]["mean"] < 1
    assert (report["calls"], report["cached"]) == (len(server.asked), 0) == (12, 0)


def test_a_sealed_folder_is_reviewed_from_the_shell(tmp_path: Path) -> None:
    import httpx2

    out, words = labelled(tmp_path)
    command = [sys.executable, "-m", "rlhf_cli", "label", *words, f"out={out}", "review=true"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        address = next(line.strip() for line in run.stderr if "http://" in line)
        base = address.partition("/?")[0]
        sent = {"content-type": "application/json", "x-label": "1", "origin": base}
        with httpx2.Client(base_url=base, headers=sent) as client:
            client.get(address.removeprefix(base))
            task = client.get("/disagreements").json()["tasks"][0]["task"]
            said = json.dumps({"task": task, "line": "5"})
            assert client.post("/review", content=said).status_code == 200
            assert not (out / "stage.json").exists()
            client.post("/finish", content="{}")
        run.stderr.read()
    assert run.returncode == 0 and (out / "stage.json").is_file()
    assert task not in {row["task"] for row in read(out / "preferences.jsonl")}


@in_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_disagreements_are_settled_by_keyboard(tmp_path: Path, browser: Any, width: int) -> None:
    from rlhf_cli.labelling.review import Review
    from tests.interop.label_pages import desks_of, task

    evil = ("<img src=x onerror=\"document.title='owned'\">", "\u202e" + "w" * 300)
    tasks: list[Task] = [task(0, 2, evil), task(1, 2)]
    desks = desks_of(tmp_path, tasks, "pair", ("ana", "bob"))
    for who, desk in desks.items():
        for turn in desk.turns:
            ranks = [1, 2] if who == "ana" else [2, 1]
            desk.answer(turn, {"kind": "pair", "ranks": ranks, "strength": 2, "both_bad": False})
    began: list[bool] = []
    scheme: Any = {"color_scheme": "dark" if width == 400 else "light"}
    with serving(lambda port: Review(desks, port, lambda: began.append(True))) as server:
        address = server.address("review")
        with visited(browser, address, width, **scheme) as page:
            page.get_by_text("2 tasks to review").wait_for()
            assert page.locator("img").count() == 0 and "owned" not in page.title()
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(wide) == 0 and not began
            first = page.locator("section").nth(0)
            first.get_by_role("button", name="take what bob says").focus()
            page.keyboard.press("Enter")
            page.get_by_text("Saved").wait_for()
            page.locator("section").nth(1).get_by_label("your own").fill("5")
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            page.locator("section").nth(1).get_by_text("reviewed").nth(1).wait_for()
            page.get_by_role("button", name="Finish").click()
            page.get_by_text("Sealed").wait_for()
    settled = [event["ranks"] for _, event in desks["ana"].answered]
    assert sorted(settled) == [[1, 1], [2, 1]] and began == [True]
