"""The page of runs: what it shows of whole, damaged, unfinished and hostile ones."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.commands.report import parse, run
from rlhf_cli.config.errors import UserError
from rlhf_cli.reporting.plots import Curve, curve_panel
from rlhf_cli.views import charts
from rlhf_cli.views.report import (
    Runs,
    data_of,
    groups_of,
    report,
    runs_at,
    sections_of,
    settings,
)
from tests.views.test_html import HOSTILE, Reader

WON = {"win": 0.6, "tie": 0.2, "loss": 0.2, "low": 0.6, "high": 0.8, "p": 0.01, "p_holm": 0.02}


def made(folder: Path, stage: str, seed: int = 0, **files: Any) -> Path:
    """A run's folder as a stage leaves it, as far as a report reads it."""
    folder.mkdir(parents=True)
    config = f"# rlhf-cli {stage} seed={seed}\nout: {folder.name}\nseed: {seed}\nalgo:\n  lr: 0.1\n"
    (folder / "config.yaml").write_text(config)
    manifest: dict[str, Any] = {
        "stage": stage,
        "kind": "policy",
        "seed": seed,
        "seconds": 3.0,
        "complete": True,
    }
    manifest["metrics"] = {"eval/loss": 0.25, "eval/loss_stderr": 0.01}
    (folder / "stage.json").write_text(json.dumps(manifest))
    for name in ("metrics", "samples"):
        if name in files:
            lines = "".join(f"{json.dumps(row)}\n" for row in files[name])
            (folder / f"{name}.jsonl").write_text(lines)
    if "report" in files:
        (folder / "report.json").write_text(json.dumps(files["report"]))
    return folder


def logged(steps: int, by: float = 0.0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 1 / step + by, "skipped": 0.0, "kl": None}
        for step in range(1, steps + 1)
    ]
    rows[-1] |= {"eval/loss": 0.25, "eval/loss_stderr": 0.01}
    return rows


def evaluation(*names: str) -> dict[str, Any]:
    figures = {"gold": {"mean": 1.0, "stderr": 0.1}, "kl": {"mean": 0.5, "stderr": 0.1}}
    bins = [{"low": 0.5, "high": 1.0, "confidence": 0.7, "accuracy": 0.6, "count": 9}]
    return {
        "policies": dict.fromkeys(names, figures),
        "frontier": [{"policy": name, "from": "policy", **figures} for name in names],
        "head_to_heads": {one: {other: WON for other in names if other != one} for one in names},
        "against_references": dict.fromkeys(names, WON),
        "ratings": {
            name: {"rating": 9.0, "low": 1.0, "high": 20.0, "not_separable": []} for name in names
        },
        "anchor": names[-1],
        "by_temperature": {
            t: {"win_rates": {names[-1]: WON}, "against_references": {}} for t in ("0", "1")
        },
        "reference": names[-1],
        "temperature": 1.0,
        "prompts": 9,
        "reward_model": {"calibration_bins": bins, "calibration_error": 0.1},
    }


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    top = tmp_path / "demo"
    made(top / "sft", "sft", metrics=logged(900))
    for seed in (0, 1, 2):
        rows = [{"step": step, "reward": step + seed / 4} for step in range(1, 9)]
        made(top / f"ppo{seed}", "ppo", seed, metrics=logged(9, seed / 8), samples=rows)
    names = [str(top / "ppo0"), str(top / "sft")]
    said = {"prompt": "Who?", "response": "Me.", "sample": 0, "temperature": 1.0, "gold": 1.0}
    judged = [{"policy": name, **said} for name in names]
    made(top / "evaluate", "evaluate", report=evaluation(*names), samples=judged)
    return top


def figures_of(runs: Runs) -> dict[str, Any]:
    sections_of(runs)
    specs: dict[str, Any] = data_of(runs)["charts"]
    return specs


def rows_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return list(spec["data"]["values"])


def test_each_part_of_a_chain_is_shown_and_every_figure_has_data(chain: Path) -> None:
    text = report(runs_at([chain]), "demo")
    read = Reader(text)
    sections = [each["id"] for tag, each in read.tags if tag == "section"]
    assert sections == [
        *("lineage", "policies", "frontier", "wins", "ratings", "rewards", "calibration"),
        *("samples", "curves", "settings"),
    ]
    asked = [each["data-chart"] for _, each in read.tags if "data-chart" in each]
    drawn = json.loads(read.scripts[0])["charts"]
    assert sorted(drawn) == sorted(map(str, asked)) and len(asked) == 11
    assert all("values" in json.dumps(spec) for spec in drawn.values())


def test_runs_that_differ_in_their_seed_alone_are_a_mean_with_its_interval(chain: Path) -> None:
    runs = runs_at([chain])
    (group,) = groups_of(runs, "ppo")
    assert group.name == "ppo0, 3 seeds"
    first = min(rows_of(figures_of(runs)["ppo-loss.0"]), key=lambda row: row["x"])
    # mean of 1, 1.125 and 1.25; their deviation is 0.125 and t of 2 degrees 4.303
    assert first["y"] == 1.125
    assert first["high"] - first["y"] == pytest.approx(4.303 * 0.125 / 3**0.5, rel=1e-4)


def test_long_runs_are_thinned_and_that_is_said(chain: Path) -> None:
    runs = runs_at([chain])
    rows = [row for row in rows_of(figures_of(runs)["sft-loss.0"]) if not row["dashed"]]
    assert len(rows) <= 200 and rows[-1]["x"] == 900
    assert rows[0]["high"] == 1.0 and rows[0]["low"] == pytest.approx(1 / 5)  # five steps each
    body = next(each.body for each in sections_of(runs) if each.name == "curves")
    assert "900 lines are drawn as means of neighbours" in body and "skipped 0" in body


def test_what_is_not_whole_is_shown_as_far_as_it_is(chain: Path) -> None:
    (chain / "ppo1" / "stage.json").write_text("{")
    (chain / "ppo2" / "stage.json").unlink()
    with (chain / "ppo2" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 10, "lo')
    (chain / "evaluate" / "report.json").write_text('{"policies": {"a": {"gold": null}}}')
    text = report(runs_at([chain]), "demo")
    states = re.findall(r'class="state (\w+)"', text)
    assert sorted(states) == ["damaged", "finished", "finished", "finished", "unfinished"]
    assert 'id="curves"' in text and 'id="frontier"' not in text


def test_what_runs_hold_is_never_markup(tmp_path: Path) -> None:
    name = "<img src=x>"
    rows = [{"step": step, HOSTILE: float(step), "loss": float(step)} for step in (1, 2)]
    folder = made(tmp_path / name, "sft", metrics=rows)
    with (folder / "config.yaml").open("a") as stream:
        stream.write("name: '</pre><script>alert(1)</script>'\n")
    judged = evaluation("a", "b") | dict.fromkeys(("prompts", "samples", "temperature"), name)
    for each in judged["ratings"].values():
        each["not_separable"] = ["a", "b"]
    other = made(tmp_path / "e", "evaluate", report=judged)
    read = Reader(report(runs_at([folder, other]), name))
    assert not {"img"} & {tag for tag, _ in read.tags}
    assert all("alert(1)" not in text for text in read.scripts[1:])


def test_a_report_is_written_beside_its_runs_and_over_no_other_file(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([str(chain), "pictures=svg"])
    assert capsys.readouterr().out == f"{chain}/report.html\n"
    pictures = sorted(each.name for each in (chain / "report").iterdir())
    assert "frontier-gold.svg" in pictures and "wins.svg" in pictures
    run([str(chain / "ppo0"), str(chain / "sft")])  # over its own
    (chain / "report.html").write_text("mine")
    with pytest.raises(UserError, match="is there and no report"):
        run([str(chain)])
    assert (chain / "report.html").read_text() == "mine"


def test_pictures_go_into_no_run_and_need_a_folder(chain: Path) -> None:
    for out, line in (("ppo0.html", "would go into the run"), ("page", "give out= a name as")):
        with pytest.raises(UserError, match=line):
            run([str(chain), f"out={chain}/{out}", "pictures=svg"])
        assert not (chain / out).exists()


def test_a_policy_alone_has_no_win_rates(chain: Path) -> None:
    found = {**evaluation("a"), "against_references": {}, "by_temperature": {}}
    (chain / "evaluate" / "report.json").write_text(json.dumps(found))
    names = [each.name for each in sections_of(runs_at([chain]))]
    assert "policies" in names and "wins" not in names


def test_the_reference_is_known_however_it_was_written(chain: Path) -> None:
    found = evaluation(*(str(chain / name) for name in ("ppo0", "sft")))
    found["reference"] += "/"
    (chain / "evaluate" / "report.json").write_text(json.dumps(found))
    rows = rows_of(figures_of(runs_at([chain]))["gold-ppo0.0"])
    assert {row["name"] for row in rows} == {"before: sft", "after: ppo0"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "takes folders of runs"),
        (["--csv"], "unknown flag --csv"),
        (["picture=png"], "no key picture; did you mean pictures"),
        (["a", "pictures=pdf"], "pictures=pdf is neither png nor svg"),
        (["out="], "out= has no value"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(words)


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs in"):
        runs_at([tmp_path])
    with pytest.raises(UserError, match="no folder"):
        runs_at([tmp_path / "absent"])


def test_a_report_needs_no_torch(chain: Path) -> None:
    program = (
        "import sys; from rlhf_cli.commands.report import run; run(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(chain)], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_runs_of_one_name_are_lines_of_their_own(tmp_path: Path) -> None:
    """Of the second one no more is judged than its snapshots."""
    kept = [f"{run}/ppo/step-{step}" for run in ("a", "b") for step in (1, 2)]
    found = evaluation("a/ppo", *kept)
    for point in found["frontier"][1:]:
        run, step = point["policy"].split("/step-")
        point |= {"from": "snapshot", "run": run, "step": int(step)}
    made(tmp_path / "evaluate", "evaluate", report=found)
    rows = rows_of(figures_of(runs_at([tmp_path]))["frontier-gold.0"])
    assert [row["name"] for row in rows] == [*3 * ["a/ppo"], *2 * ["b/ppo"]]


def test_policies_are_called_by_what_tells_them_apart() -> None:
    """A snapshot says whose it is."""
    paths = ["runs/a/ppo", "runs/a/dpo", "runs/b/dpo", "runs/a/ppo/step-10", "me/model best of 4"]
    name_of = charts.names_for(paths)
    told = ["ppo", "runs/a/dpo", "runs/b/dpo", "ppo/step-10", "model best of 4"]
    assert [name_of(path) for path in paths] == told
    assert name_of("runs/a/sft") == "sft"  # of the reference, which need not be judged


def test_the_runs_of_a_sweep_are_lines_of_a_table(tmp_path: Path) -> None:
    """Up to six stand beside each other."""
    for i in range(7):
        folder = made(tmp_path / f"sweep/lr={i}", "ppo", metrics=[{"step": 1, "reward": i}])
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("lr: 0.1", f"lr: {i}"))
    text = settings(runs_at([tmp_path]))
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in text.split("<tr>")[1:]]
    assert rows[0][:2] == ["run", "algo.lr"] and len(rows) == 8
    assert [row[:2] for row in rows[1:]] == [[f"lr={i}", str(i)] for i in range(7)]
    text = settings(runs_at(sorted(tmp_path.glob("sweep/*"))[:6]))
    assert "settings that differ</caption>" in text and '<th scope="row">algo.lr' in text


def test_many_policies_are_told_apart(tmp_path: Path) -> None:
    """By shapes once colours have gone round."""
    names = [f"p{i}" for i in range(9)]
    curves = [Curve(name, [0.0], [1.0], joined=False) for name in names]
    spec = curve_panel("gold", "KL", curves, names).to_dict()
    (shape,) = [layer["encoding"]["shape"] for layer in spec["layer"] if "shape" in str(layer)]
    assert shape["scale"]["range"] == [*["circle"] * 8, "square"]
    assert "shape" not in str(curve_panel("gold", "KL", curves[:8], names[:8]).to_dict())
