"""The page of a report in a browser: in both themes, on a phone, by keyboard, by mouse."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError
from rlhf_cli.views.html import Section, page
from rlhf_cli.views.samples import samples_of
from tests.interop.browser import chromium, faint, opened
from tests.labelling.test_label import given, label, typed
from tests.tiny import DATA, run_stage
from tests.views.test_report import WON, evaluation, made
from tests.views.test_samples import record

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.interop

HOSTILE = "</script><script>hacked=1</script><img src=x onerror=hacked=1>{{7*7}}<!--"
TURNED = "a\u202eb\u200bc\x1b[31m\u2066d\ud800e\U000e0041 \u05d0\u05d1"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def runs(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with report.html, and `report`, its folder of an evaluation."""
    from rlhf_cli.stages import evaluate
    from rlhf_cli.views.report import report, runs_at

    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(chain):
        words = ["algo.steps=2", "algo.show_every=1", "hardware.save_every=null"]
        run_stage("ppo", folder / "ppo", *words, "policy=runs/demo/sft")
        baselines = f"baselines=[runs/demo/sft,{folder}/ppo]"
        words = ["policy=runs/demo/adapter", baselines, "reference=runs/demo/sft"]
        sizes = ["algo.prompts=12", "data.eval_rows=12", "algo.samples=2", "algo.max_tokens=6"]
        out = folder / "report"
        judges = ["reward=runs/demo/reward", "gold=length:2"]
        evaluate.run(compose("evaluate", [*DATA, *words, *sizes, *judges, f"out={out}"]))
        folders = [Path("runs/demo") / name for name in ("sft", "reward", "adapter")]
        text = report(runs_at([*folders, folder / "ppo", out]), "demo")
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder


def lines_of(runs: Path) -> list[dict[str, Any]]:
    text = (runs / "report/samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def browser_page(folder: Path, lines: list[Any]) -> Path:
    """A page with the browser of samples alone, of an evaluation that wrote these lines."""
    samples = samples_of([record(folder / "e", "evaluate", lines)])
    file = folder / "page.html"
    data = {"charts": {}, "theme": {}, "samples": samples}
    file.write_text(page("t", [Section("samples", "Samples")], data, ""), encoding="utf-8")
    return file


def cards(page: "Page") -> "Locator":
    return page.locator("#samples article.prompt")


def named(text: str) -> str:
    """A response as it is shown, in which control characters are named."""
    shown = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"U+{ord(c[0]):04X}", text)
    return shown or "empty"


def status(page: "Page") -> str:
    return page.locator("#samples p.status").inner_text()


def differences(page: "Page") -> list[float]:
    texts = page.locator("#samples .compared b").all_inner_texts()
    return [float(text.split()[-1].replace("\u2212", "-")) for text in texts]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_whole_page(browser: "Browser", runs: Path, scheme: str, width: int) -> None:
    """Every picture is drawn, nothing is wider than the window, texts are seen on their ground."""
    with opened(browser, runs / "report.html", width, scheme) as page:
        seen = page.locator("[data-chart]:visible").count()
        assert 0 < seen == page.locator("[data-chart] svg").count()
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        figures = page.locator("[data-chart]").count()
        page.locator(f'body[data-drawn="{figures}"]').wait_for(state="attached")
        drawn = page.locator("[data-chart] svg")
        assert seen < figures == drawn.count()
        boxes = [each.bounding_box() for each in drawn.all()]
        assert all(box and 200 < box["width"] <= width for box in boxes)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert cards(page).count() == 10
        for each in page.locator(".answer summary").all()[:3]:
            each.click()
        assert faint(page) == [] and unsaid(page) == []
        page.emulate_media(media="print")
        assert not page.locator("#samples .controls").is_visible()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a label folder with errors, and of one that is not sealed."""
    from rlhf_cli.views.report import report, runs_at

    folder = tmp_path_factory.mktemp("labels")
    policies = ("runs/sft", "runs/ppo", "runs/dpo")
    words = [given(folder / "s.jsonl", 12, 2, policies), "policy=null", "annotators=[ana,bob]"]
    words += ["algo.overlap=0.5", "algo.repeat=0.1"]
    label(folder / "runs/sealed", *words, "source=reward", "flip=0.25")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError):
        typed(patch, f"m {HOSTILE}", "1 2=3 4", "f a phone number", "4 3 2 1")
        label(folder / "runs/open", *words)
    text = report(runs_at([folder / "runs"]), "labels")
    (folder / "labels.html").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_page_of_labels(browser: "Browser", labelled: Path, scheme: str, width: int) -> None:
    with opened(browser, labelled / "labels.html", width, scheme) as page:
        assert page.locator("#labels [data-chart] svg").count() == 1
        assert "Not sealed: 3 of 20 labels are there" in page.locator("#labels").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert faint(page) == [] and unsaid(page) == []


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of twelve policies, of which each wins all against those after it."""
    from rlhf_cli.views.report import report, runs_at

    folder = tmp_path_factory.mktemp("rated")
    names = [f"policy-{i:02}-of-a-sweep-over-lr=1e-{i}" for i in range(12)]
    judged = evaluation(*names)
    for place, one in enumerate(names):
        for other in judged["head_to_heads"][one]:
            won = float(place < names.index(other))
            judged["head_to_heads"][one][other] = WON | {"win": won, "tie": 0.0}
    made(folder / "evaluate", "evaluate", report=judged)
    (folder / "page.html").write_text(report(runs_at([folder]), "rated"), encoding="utf-8")
    return folder / "page.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_matrix_of_many_policies(
    browser: "Browser", rated: Path, scheme: str, width: int
) -> None:
    """No number covers another one, and on a phone they move along beneath the names of rows."""
    with opened(browser, rated, width, scheme) as page:
        matrix = page.locator("#wins .matrix")
        scores = matrix.locator("td span")
        assert scores.count() == 12 * 11
        assert scores.evaluate_all("all => all.every(each => each.scrollWidth <= each.clientWidth)")
        words = page.locator("#wins .chart text")
        ends = words.evaluate_all("all => all.map(each => each.getBoundingClientRect().right)")
        assert max(ends) <= width
        assert faint(page) == [] and unsaid(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        around = page.locator("#wins .wide", has=page.locator(".matrix"))
        hidden = around.evaluate("each => each.scrollWidth - each.clientWidth")
        assert (hidden > 100) == (width == 400)
        around.evaluate("each => each.scrollTo(each.scrollWidth, 0)")
        name, last = matrix.locator("tbody th").first, matrix.locator("tbody tr").first
        shown, end = name.bounding_box(), last.locator("td").last.bounding_box()
        assert shown and end and shown["x"] >= 0 and shown["width"] < width / 2
        assert shown["x"] + shown["width"] <= end["x"] and end["x"] + end["width"] <= width


def test_labelled_tasks_are_found_by_what_was_said(browser: "Browser", labelled: Path) -> None:
    shown = json.loads((labelled / "runs/sealed/report.json").read_text())
    with opened(browser, labelled / "labels.html") as page:
        samples = page.locator("#samples")
        sealed = samples.get_by_label("Samples").locator("option", has_text="sealed")
        samples.get_by_label("Samples").focus()
        samples.get_by_label("Samples").select_option(label=sealed.inner_text())
        assert page.evaluate("document.activeElement.id") == "samples-samples"
        assert status(page) == "12 prompts, 1 to 10 shown."
        first = cards(page).first
        assert first.locator(".answer").count() == 4 and first.locator(".stepper").count() == 0
        samples.get_by_label("Show").select_option("annotators disagree")
        apart = cards(page).count()
        assert 0 < apart < shown["between_annotators"]["tasks"] + 1
        for each in cards(page).all():
            said = each.locator(".said").all_inner_texts()
            assert any(len({rank[-1] for rank in line.split("\n")}) > 1 for line in said)
        samples.get_by_label("Policy", exact=True).select_option(label="dpo")
        samples.get_by_label("Compared with").select_option(label="sft")
        samples.get_by_label("Order").select_option("difference")
        assert differences(page) == sorted(differences(page), reverse=True)

        other = samples.get_by_label("Samples").locator("option", has_text="/open")
        samples.get_by_label("Samples").select_option(label=other.inner_text())
        heads = samples.locator(".answer h4").all_inner_texts()
        assert set(heads) == {"not told until sealed"}
        samples.get_by_label("Show").select_option("with a note")
        assert cards(page).count() == 1 and page.evaluate("window.hacked") is None
        assert f"ana noted: {HOSTILE}" in cards(page).first.inner_text()
        samples.get_by_label("Show").select_option("")
        samples.get_by_label("Search").fill("phone number")
        page.locator("#samples .status", has_text="1 of 12 prompts").wait_for()


def unsaid(page: "Page") -> list[str]:
    """What has no name, or no words, for whoever does not see it."""
    found: list[str] = page.evaluate(
        """() => [
          ...[...document.querySelectorAll("th")].filter((each) => !each.textContent.trim()),
          ...[...document.querySelectorAll("[role=img]")].filter(
            (each) => !/\\. .*[0-9]/.test(each.ariaLabel),
          ),
          ...[...document.querySelectorAll("[tabindex='0']")].filter((each) => !each.ariaLabel),
          ...[...document.querySelectorAll("main *")].filter(
            (each) => each.scrollWidth > each.clientWidth + 1 && each.tabIndex < 0
              && /auto|scroll/.test(getComputedStyle(each).overflowX),
          ),
          ...document.querySelectorAll(".prompt section"), // each would be a landmark
        ].map((each) => each.outerHTML.slice(0, 100))"""
    )
    return found


def test_the_browser_of_samples_by_mouse(browser: "Browser", runs: Path) -> None:
    lines = lines_of(runs)
    sums: dict[tuple[str, str], float] = {}
    for line in lines:
        key = line["prompt"], Path(line["policy"]).name
        sums[key] = sums.get(key, 0) + line["reward"] / 2
    gains = {prompt: sums[prompt, "adapter"] - sums[prompt, "sft"] for prompt, _ in sums}
    with opened(browser, runs / "report.html") as page:
        samples = page.locator("#samples")
        assert status(page) == "12 prompts, 1 to 10 shown."
        samples.get_by_label("Order").select_option("difference")
        best = max(gains, key=lambda prompt: gains[prompt])
        assert cards(page).first.locator(".asked").inner_text().strip() == best.strip()
        assert differences(page)[0] == pytest.approx(gains[best], rel=0.01, abs=2e-3)
        assert differences(page) == sorted(differences(page), reverse=True)
        others = samples.get_by_label("Compared with")
        (ppo,) = [each for each in others.locator("option").all_inner_texts() if "ppo" in each]
        others.select_option(label=ppo)
        assert f", {ppo} " in page.locator("#samples .compared").first.inner_text()
        assert cards(page).first.locator(".answer").count() == 3
        samples.get_by_label("these two alone").check()
        assert cards(page).first.locator(".answer").count() == 2

        token = cards(page).first.locator(".token").first
        token.hover()
        told = cards(page).first.locator("output.told").first.inner_text()
        policy = "runs/demo/adapter"
        asked = cards(page).first.locator(".asked").inner_text().strip()
        ours = [each for each in lines if each["policy"] == policy]
        first = next(each for each in ours if each["prompt"].strip() == asked)
        assert told.startswith(f"1 of {len(first['tokens'])}, ")
        size = float(re.findall(r"KL ([\u22120-9.]+)", told)[0].replace("\u2212", "-"))
        assert size == pytest.approx(first["kls"][0], abs=5e-4 + abs(first["kls"][0]) / 100)
        table = cards(page).first.locator("details").first
        table.locator("summary").click()
        table.locator("tbody tr").first.wait_for()
        assert table.locator("tbody tr").count() == len(first["tokens"])
        samples.get_by_label("Colour").select_option("")
        assert page.locator("#samples .token").count() == 0
        page.get_by_role("button", name="Next", exact=True).click()
        assert status(page).startswith("12 prompts, 11 to 12 shown") and cards(page).count() == 2
        samples.get_by_label("Samples").select_option(label="in training")
        assert "step 2" in cards(page).first.inner_text()
        assert page.locator("#samples .stepper").count() == 0  # all responses to a prompt beside
        samples.get_by_label("Colour").select_option("advantages")
        assert page.locator("#samples .token.above, #samples .token.below").count() > 10


def test_the_browser_of_samples_by_keyboard(browser: "Browser", runs: Path) -> None:
    lines = lines_of(runs)
    prompts = list(dict.fromkeys(line["prompt"].strip() for line in lines))

    def focused(page: "Page") -> str:
        return str(
            page.evaluate("document.activeElement.querySelector('.asked')?.innerText ?? ''")
        ).strip()

    with opened(browser, runs / "report.html") as page:
        page.get_by_label("Search").focus()
        page.keyboard.press("Enter")
        assert focused(page) == prompts[0]
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("k")
        assert focused(page) == prompts[1]
        of = [line["response"] for line in lines if line["prompt"].strip() == prompts[1]][:2]
        second = cards(page).nth(1)
        page.keyboard.press("]")
        assert second.locator(".stepper span").inner_text() == "response 2 of 2"
        assert second.locator(".answer .text").first.inner_text() == named(of[1])
        page.keyboard.press("[")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        told = second.locator("output.told").first
        page.keyboard.press("Home")
        first = told.inner_text()
        page.keyboard.press("ArrowRight")
        assert told.inner_text() != first and "log-prob" in told.inner_text()
        page.keyboard.press("End")
        count = len(next(line for line in lines if line["prompt"].strip() == prompts[1])["tokens"])
        assert told.inner_text().startswith(f"{count} of {count}, ")
        for _ in range(9):
            page.keyboard.press("j")
        assert focused(page) == prompts[10] and "11 to 12 shown" in status(page)
        page.keyboard.press("k")
        assert focused(page) == prompts[9]

        page.keyboard.press("/")
        page.keyboard.type(prompts[4].split()[1].upper())
        page.locator("#samples .status", has_text=" of 12 prompts").wait_for()
        word = prompts[4].split()[1].lower()
        assert all(word in text.lower() for text in cards(page).all_inner_texts())
        assert page.evaluate("CSS.highlights.get('found').size") >= 1
        page.keyboard.type("no such words")
        page.locator("#samples .status", has_text="0 of 12 prompts.").wait_for()
        assert cards(page).count() == 0


def test_texts_are_texts(browser: "Browser", tmp_path: Path) -> None:
    """Markup is shown, what is not seen is named, and a megabyte is neither slow nor wide."""
    texts = [HOSTILE, TURNED, "w" * 10**6, "", "\u0628" * 50 + "\n\tend", "Z" + "\u0335" * 500]
    lines = [
        {"policy": name, "temperature": 1, "prompt": prompt, "response": text, "reward": 1.0}
        | {"tokens": [text[:2], text[2:]], "kls": [0.5, -0.25]}
        for name in ("__proto__", HOSTILE, TURNED)
        for prompt, text in zip([HOSTILE, TURNED, "__proto__", "", "e", "z"], texts, strict=True)
    ]
    file = browser_page(tmp_path, lines)
    assert file.stat().st_size < 500_000
    for width, scheme in ((400, "dark"), (1400, "light")):
        with opened(browser, file, width, scheme) as page:
            assert cards(page).count() == 6
            assert faint(page) == [] and unsaid(page) == []
            assert page.evaluate("window.hacked") is None
            assert page.locator("img, #samples script").count() == 0
            shown = cards(page).first.locator(".asked .text").inner_text()
            assert shown == HOSTILE
            coloured = cards(page).first.locator(".answer .text").first.inner_text()
            assert coloured == HOSTILE
            turned = cards(page).nth(1)
            seen = turned.locator(".asked .unseen").all_inner_texts()
            assert seen == ["U+202E", "U+200B", "U+001B", "U+2066", "U+D800", "U+E0041"]
            assert turned.locator(".asked .text").inner_text().startswith("aU+202Eb")
            assert cards(page).nth(3).locator(".text.empty").count() > 1
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.get_by_label("Search").fill("<IMG SRC")
            page.locator("#samples .status", has_text="1 of 6 prompts").wait_for()
            assert page.evaluate("[...CSS.highlights.get('found')][0].toString()") == "<img src"


def test_a_long_text_is_scrolled_by_keys(browser: "Browser", tmp_path: Path) -> None:
    line = {"policy": "one", "temperature": 1, "prompt": "p", "reward": 1.0}
    lines = [{**line, "response": text} for text in ("short", "line\n" * 200)]
    with opened(browser, browser_page(tmp_path, lines)) as page:
        text = cards(page).get_by_role("group", name="long text")
        assert text.count() == 1 and "line" in text.inner_text()
        text.focus()
        page.keyboard.press("End")
        page.wait_for_function("document.activeElement.scrollTop > 100")


def test_a_response_is_numbered_by_those_of_its_step(browser: "Browser", tmp_path: Path) -> None:
    """The third of three, then a step with two."""
    runs = [
        record(
            tmp_path / name,
            "ppo",
            [
                {"step": step, "prompt": "p", "response": f"{step} {i}"}
                for step in (1, 2)
                for i in range(4 - step)
            ],
        )
        for name in ("one", "other")
    ]
    file = tmp_path / "page.html"
    data = {"charts": {}, "theme": {}, "samples": samples_of(runs)}
    file.write_text(page("t", [Section("samples", "Samples")], data, ""), encoding="utf-8")
    with opened(browser, file) as shown:
        label = shown.locator("#samples .stepper span")
        shown.get_by_label("Step", exact=True).select_option("1")
        shown.get_by_label("previous response").click()
        assert label.inner_text() == "response 3 of 3"
        shown.get_by_label("Step", exact=True).select_option("2")
        assert label.inner_text() == "response 1 of 2"
        assert shown.locator("#samples .answer .text").all_inner_texts() == ["2 0", "2 0"]
