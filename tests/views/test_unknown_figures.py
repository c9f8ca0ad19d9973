"""Figures that are infinite, or that nobody knows, are null in what stages write: whoever shows
them says so, or leaves them out, and breaks at none.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.commands import compare, ls, report, watch
from rlhf_cli.runs.lineage import read_node
from rlhf_cli.views.report import data_of, runs_at, sections_of
from tests.views.test_report import evaluation, logged, made

UNKNOWN = re.compile(r"\b(None|nan|NaN|null|inf|undefined)\b")
Name = str


def judged(*names: str) -> dict[str, Any]:
    """A report of evaluate with every figure that a page shows."""
    found = evaluation(*names)
    for each in found["policies"].values():
        each |= {"length": 8.5, "length_stderr": 0.5, "entropy": {"mean": 2.0, "stderr": 0.1}}
    for each in found["ratings"].values():
        each["not_separable"] = [names[0]]
    won = next(iter(found["against_references"].values()))
    return {
        **found,
        "judge": {"judge": "qwen", "win_rates": {names[-1]: won}},
        "calibration_bins": found["reward_model"]["calibration_bins"],
    }


def leaves(value: Any, name: str = "") -> Iterator[Name]:
    """The names under which numbers stand, at any depth."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name


def without(value: Any, lost: Callable[[Name], bool], name: str = "") -> Any:
    """The same with null in the place of numbers of these names."""
    if isinstance(value, dict):
        return {key: without(each, lost, key) for key, each in value.items()}
    if isinstance(value, list):
        return [without(each, lost, name) for each in value]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and lost(name) else value


NAMES = sorted(set(leaves(judged("a", "b"))))


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for stage in ("sft", "ppo"):
        made(Path("demo", stage), stage, metrics=logged(5))
    names = ("demo/ppo", "demo/sft")
    said = {"prompt": "Who?", "response": "Me.", "temperature": 1.0, "gold": 1.0, "reward": 2.0}
    lines = [{"policy": name, **said} for name in names]
    made(Path("demo/evaluate"), "evaluate", report=judged(*names), samples=lines)
    return Path("demo")


def lose(chain: Path, lost: Callable[[Name], bool]) -> None:
    """Put null in the place of figures in all that the runs have written."""
    for file in chain.rglob("*.json"):
        said = json.loads(file.read_text())
        if file.name == "stage.json":  # what stages wrote of figures, not of themselves
            said["metrics"] = without(said["metrics"], lost)
            if said["stage"] == "evaluate":
                said["parents"] = {"policy": {"path": "demo/ppo", "hash": ""}}
                said["metrics"] = without(judged("demo/ppo", "demo/sft"), lost)
            file.write_text(json.dumps(said))
        else:
            file.write_text(json.dumps(without(said, lost)))
    for file in chain.rglob("*.jsonl"):
        rows = [without(json.loads(line), lost) for line in file.read_text().splitlines()]
        kept = [row | {"step": i + 1} for i, row in enumerate(rows)]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in kept))


def seen_on_page(chain: Path) -> tuple[str, dict[str, Any]]:
    """The words of a page, and the data of its figures."""
    runs = runs_at([chain])
    body = "\n".join(each.body for each in sections_of(runs))
    words = re.sub(r"<details>.*?</details>", "", body, flags=re.S)  # configs as they were written
    return re.sub(r"<[^>]*>", " ", words), data_of(runs)["charts"]


def drawn(spec: Any) -> list[dict[str, Any]]:
    """The rows of a figure."""
    layers = [spec, *spec.get("layer", [])]
    return [row for layer in layers for row in (layer.get("data") or {}).get("values", [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_figure_that_is_not_known(chain: Path, name: str) -> None:
    lose(chain, lambda each: each == name)
    words, charts = seen_on_page(chain)
    assert not UNKNOWN.search(words), UNKNOWN.search(words)
    for spec in charts.values():
        assert drawn(spec) and not UNKNOWN.search(json.dumps(drawn(spec)))


def test_no_figure_is_known(
    chain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(chain, lambda each: True)
    words, charts = seen_on_page(chain)
    assert not UNKNOWN.search(words) and "Lineage" not in words and charts == {}
    report.run([str(chain), "pictures=svg"])
    ls.run(["runs", "demo"])
    compare.run(["demo/evaluate", "demo/ppo"])
    compare.run(["demo", "--csv"])
    watch.run(["demo"])
    watch.run(["demo/evaluate"])
    assert not UNKNOWN.search(capsys.readouterr().out)


def test_an_error_is_not_taken_for_what_it_is_the_error_of(chain: Path) -> None:
    lose(chain, lambda each: each in ("eval/loss", "loss"))
    assert read_node(chain / "sft", lambda kind, path: None).figures == {}


def test_what_is_not_drawn_is_named(chain: Path) -> None:
    file = chain / "evaluate/report.json"
    found = json.loads(file.read_text())
    found["policies"]["demo/ppo"]["kl"] = {"mean": None, "stderr": None}
    found["frontier"][0]["kl"]["mean"] = None
    found["ratings"]["demo/ppo"] |= dict.fromkeys(("rating", "low", "high"))
    file.write_text(json.dumps(found))
    words, charts = seen_on_page(chain)
    assert "Not drawn, as its KL or score is not known or infinite: ppo." in words
    assert "Not rated: ppo." in words and "– is not known, or infinite." in words
    assert {row["name"] for row in drawn(charts["ratings.0"])} == {"sft"}
