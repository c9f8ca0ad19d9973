"""`rlhf-cli ls runs`: what was made from what, told from folders as stages leave them."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.commands import ls
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.stages import STAGES
from rlhf_cli.folders.manifest import content_hash
from rlhf_cli.runs.lineage import Node, trees
from rlhf_cli.runs.provenance import input_hash
from tests.conftest import Cli

CONFIG = "# rlhf-cli {words}\nname: demo\nout: {out}\nseed: 3\npolicy: runs/demo/sft\n"
Tree = dict[str, Any]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own, as a user would."""
    monkeypatch.chdir(tmp_path)


def write_run(out: str, words: str, parents: dict[str, str] | None = None, **more: Any) -> Path:
    """A finished run as its stage leaves it; its weights are its own."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.format(words=words, out=out))
    (folder / "model.safetensors").write_text(out)
    manifest = {
        "stage": words.split()[0],
        "kind": "policy",
        "parents": {
            role: {"path": path, "hash": content_hash(path)}
            for role, path in (parents or {}).items()
        },
        "seed": 3,
        "metrics": {},
        "seconds": 8.24,
        "complete": True,
        **more,
    }
    (folder / "stage.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def chain() -> None:
    """The runs of a chain: sft -> reward, ppo -> generate, evaluate."""
    write_run("runs/demo/sft", "sft", metrics={"eval/loss": 1.25, "text/loss": 9.0})
    policy = {"policy": "runs/demo/sft"}
    write_run("runs/demo/reward", "reward", policy, metrics={"eval/accuracy": 0.75})
    both = {**policy, "reward": "runs/demo/reward"}
    seen = {"reward": 0.5, "kl": 3.0, "eval/gold": -2.0}
    write_run("runs/demo/ppo", "ppo algo=ppo_ptx", both, metrics=seen, seconds=3725)
    from_ppo = {"policy": "runs/demo/ppo"}
    write_run("runs/demo/generate", "generate", from_ppo, metrics={"samples": 4, "reward": 0.1})
    judged = {"reward": {"mean": 1.5, "stderr": 0.1}, "gold": {"mean": 2.5, "stderr": 0.1}}
    write_run(
        "runs/demo/evaluate",
        "evaluate",
        {**from_ppo, "baseline runs/demo/sft": "runs/demo/sft"},
        metrics={"policies": {"runs/demo/sft": {}, "runs/demo/ppo": judged}},
    )


def by_folder(*folders: str) -> dict[str, Node]:
    """Every run in the trees."""

    def walk(nodes: list[Node]) -> Iterator[Node]:
        for node in nodes:
            yield node
            yield from walk(node.children)

    return {str(node.folder): node for node in walk(trees([Path(each) for each in folders]))}


def shape(nodes: list[Node]) -> Tree:
    """The trees as nested dicts of folder names."""
    return {node.folder.name: shape(node.children) for node in nodes}


def notes(out: str) -> list[str]:
    return ls._notes(by_folder("runs")[out])


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def test_a_tree_of_what_was_made_from_what(chain: None, cli: Cli) -> None:
    assert shape(trees([Path("runs")])) == {
        "sft": {"reward": {}, "ppo": {"generate": {}, "evaluate": {}}}
    }
    done = cli("ls", "runs", TZ="UTC", COLUMNS="40")  # no terminal, so no limit
    assert (done.returncode, done.stderr) == (0, "")
    lines = [cells(line) for line in done.stdout.splitlines()]
    day = lines[1][5]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", day)
    assert lines == [
        ["run", "stage", "algo", "state", "time", "ended", "metric", "seed", "notes"],
        ["runs/demo/sft", "sft", "sft", "finished", "8.2 s", day, "eval/loss 1.25", "3"],
        [
            *("├─ runs/demo/reward", "reward", "bradley_terry", "finished", "8.2 s", day),
            *("eval/accuracy 0.75", "3"),
        ],
        [
            *("└─ runs/demo/ppo", "ppo", "ppo_ptx", "finished", "1 h 02 min", day),
            *("reward 0.5, eval/gold -2", "3", "reward: runs/demo/reward"),
        ],
        [
            *("├─ runs/demo/generate", "generate", "generate", "finished", "8.2 s", day),
            *("reward 0.1", "3"),
        ],
        [
            *("└─ runs/demo/evaluate", "evaluate", "evaluate", "finished", "8.2 s", day),
            *("gold 2.5, reward 1.5", "3", "baseline: runs/demo/sft"),
        ],
    ]


def write_rows(out: str, words: str, parents: dict[str, str], *files: str) -> None:
    """A finished folder of rows."""
    folder = write_run(out, words, parents)
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_text(f'{{"prompt": "{out}"}}\n')
    manifest = json.loads((folder / "stage.json").read_text())
    kind = STAGES[words.split()[0]].writes
    sealed = {name: {"size": 0, "sha256": ""} for name in files}
    (folder / "stage.json").write_text(json.dumps({**manifest, "kind": kind, "files": sealed}))


@pytest.fixture
def rounds() -> None:
    """Two rounds of labels from the policy of sft, as recipes/online.sh makes them."""
    sft = {"policy": "runs/sft"}
    write_run("runs/sft", "sft")
    labels: dict[str, str] = {}
    newest = "runs/sft"
    for number in (1, 2):
        here = f"runs/round{number}"
        write_rows(f"{here}/label", "label", {"policy": newest}, "rankings.jsonl", "tasks.jsonl")
        labels[f"rows {here}/label"] = f"{here}/label"
        write_run(f"{here}/reward", "reward algo=kwise", sft | labels, kind="reward")
        write_run(f"{here}/ppo", "ppo", {**sft, "reward": f"{here}/reward"})
        newest = f"{here}/ppo"
    judged = {"policy": newest, "reward": "runs/round2/reward", "baseline runs/sft": "runs/sft"}
    write_run("runs/evaluate", "evaluate", judged)


def test_rounds_of_labels_stand_one_beneath_the_other(rounds: None, cli: Cli) -> None:
    last: Tree = {"label": {"reward": {"ppo": {"evaluate": {}}}}}
    assert shape(trees([Path("runs")])) == {"sft": {"label": {"reward": {"ppo": last}}}}
    assert notes("runs/round1/reward") == ["policy: runs/sft"]
    assert notes("runs/round2/reward") == ["policy: runs/sft", "rows: runs/round1/label"]
    assert notes("runs/round2/ppo") == ["policy: runs/sft"]
    done = cli("ls", "runs")  # in a pipe
    assert f"\n{9 * ' '}└─ runs/round2/label  " in done.stdout and done.stderr == ""
    told = {each["folder"]: each for each in json.loads(cli("ls", "runs", "--json").stdout)}
    assert told["runs/round2/reward"]["under"] == "runs/round2/label"
    assert [each["role"] for each in told["runs/round2/reward"]["sources"]] == [
        *("policy", "rows", "rows")
    ]
    assert told["runs/evaluate"]["under"] == "runs/round2/ppo"


def test_labels_that_are_edited_or_gone_are_said(rounds: None) -> None:
    Path("runs/round1/label/rankings.jsonl").write_text("{}\n")
    Path("runs/round1/label/mine.jsonl").write_text("not of the stage")
    assert "rows runs/round1/label has changed since" in notes("runs/round2/reward")
    Path("runs/round2/label").rename("runs/moved")
    assert "rows runs/round2/label is gone" in notes("runs/round2/reward")
    # what is left of it: the first round, with the second reward beneath the labels that are there
    tree: Tree = {"label": {"reward": {"ppo": {"label": {}}}, "reward ": {"ppo": {"evaluate": {}}}}}
    Path("runs/round2/reward").rename("runs/round2/reward ")  # a name of its own in `shape`
    write_run("runs/round2/ppo", "ppo", {"policy": "runs/sft", "reward": "runs/round2/reward "})
    Path("runs/moved").rename("runs/label")
    assert shape(trees([Path("runs")])) == {"sft": tree}


def test_what_learnt_from_samples_hangs_under_them(chain: None) -> None:
    write_rows("runs/best", "generate", {"policy": "runs/demo/sft"}, "demonstrations.jsonl")
    made = {"model": "runs/demo/sft", "rows runs/best": "runs/best"}
    write_run("runs/rejection", "sft", made)
    found = by_folder("runs")
    assert found["runs/best"] in found["runs/demo/sft"].children
    assert found["runs/best"].children == [found["runs/rejection"]]
    assert notes("runs/rejection") == ["model: runs/demo/sft"]
    alone = trees([Path("runs/rejection"), Path("runs/demo/sft")])  # without the samples
    assert shape(alone) == {"sft": {"rejection": {}}}


def test_what_goes_on_from_a_snapshot_hangs_under_its_run(chain: None) -> None:
    write_run("runs/on", "dpo", {"policy": "runs/demo/ppo/step-20"})
    found = by_folder("runs")
    assert found["runs/on"] in found["runs/demo/ppo"].children


def test_a_narrow_terminal_gets_lines_that_fit(chain: None, cli: Cli) -> None:
    done = cli("ls", "runs", COLUMNS="50", FORCE_COLOR="1")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 50
    assert "└─ runs/demo/ppo" in lines and "   │  runs/demo/reward" not in lines
    flat = " ".join(" ".join(line.strip("│├└─ ") for line in lines).split())
    assert "ppo, ppo_ptx, finished, 1 h 02 min" in flat
    assert "reward 0.5, eval/gold -2, seed 3; reward: runs/demo/reward" in flat


def test_runs_as_json(chain: None, cli: Cli) -> None:
    done = cli("ls", "runs", "--json", TZ="UTC")
    assert (done.returncode, done.stderr) == (0, "")
    runs = {each["folder"]: each for each in json.loads(done.stdout)}
    ppo = runs["runs/demo/ppo"]
    assert {key: ppo[key] for key in ("under", "stage", "algo", "state", "seed", "seconds")} == {
        "under": "runs/demo/sft",
        "stage": "ppo",
        "algo": "ppo_ptx",
        "state": "finished",
        "seed": 3,
        "seconds": 3725,
    }
    assert ppo["metrics"] == {"reward": 0.5, "eval/gold": -2.0}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", ppo["ended"])
    sources = [(each["role"], each["fault"]) for each in ppo["sources"]]
    assert sources == [("policy", None), ("reward", None)]
    assert runs["runs/demo/sft"]["under"] is None


def test_no_runs_as_json(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert cli("ls", "runs", "--json").stdout == "[]\n"
    assert cli("ls", "runs", "--jsn").returncode == 2


def test_folders_are_read_wherever_one_stands(chain: None, cli: Cli, tmp_path: Path) -> None:
    """Paths in stage.json start where the stage ran, which its `out` tells."""
    (tmp_path / "elsewhere").mkdir()
    done = cli("ls", "runs", "../runs/demo", cwd=tmp_path / "elsewhere")
    assert "└─ ../runs/demo/ppo" in done.stdout
    assert "gone" not in done.stdout and "changed" not in done.stdout
    assert shape(trees([Path("runs/demo/ppo"), Path("runs/demo/sft")])) == {"sft": {"ppo": {}}}
    assert shape(trees([Path("runs/demo/ppo")])) == {"ppo": {}}  # its source is not looked at


def test_what_has_happened_to_a_source_since(chain: None) -> None:
    assert notes("runs/demo/ppo") == ["reward: runs/demo/reward"]
    Path("runs/demo/sft/model.safetensors").write_text("other weights")
    assert "policy runs/demo/sft has changed since" in notes("runs/demo/ppo")
    assert "policy runs/demo/sft has changed since" in notes("runs/demo/reward")
    assert notes("runs/demo/generate") == []
    Path("runs/demo/reward").rename("runs/demo/moved")
    assert "reward runs/demo/reward is gone" in notes("runs/demo/ppo")
    Path("runs/demo/ppo/adapter_config.json").write_text("{")
    assert "policy runs/demo/ppo cannot be read" in notes("runs/demo/generate")


def test_what_has_happened_to_data_since(chain: None) -> None:
    Path("rows").mkdir()
    for name in ("rows/a.jsonl", "rows/b.csv", "more.jsonl", "mine.py"):
        Path(name).write_text(name)
    places = {"data.path[0]": "rows", "data.path[1]": "m*.jsonl", "reward mine.py": "mine.py"}
    inputs = {role: {"path": path, "hash": input_hash(path)} for role, path in places.items()}
    write_run("runs/demo/grpo", "grpo", {"policy": "runs/demo/sft"}, inputs=inputs)
    assert notes("runs/demo/grpo") == []
    Path("rows/b.csv").write_text("other")
    Path("mine.py").unlink()
    Path("more.jsonl").unlink()
    assert notes("runs/demo/grpo") == [
        *("data.path[0] rows has changed since", "data.path[1] m*.jsonl is gone"),
        "reward mine.py is gone",
    ]


def test_states(chain: None) -> None:
    stopped = {"step": 4, "alarms": ["kl", "length"]}
    write_run("runs/stopped", "ppo", stopped=stopped)
    for name in ("begun", "killed"):
        folder = write_run(f"runs/{name}", "grpo algo=dapo", {"policy": "runs/demo/sft"})
        (folder / "checkpoints").mkdir()
        (folder / "stage.json").rename(folder / "checkpoints/inputs.json")
    for step in (8, 10):
        Path(f"runs/killed/checkpoints/step-{step:08}").mkdir(parents=True)
    found = by_folder("runs")
    assert found["runs/stopped"].state == "stopped at step 4 by kl, length"
    assert found["runs/begun"].state == "unfinished"
    killed = found["runs/killed"]
    assert killed.state == "unfinished at step 10"
    assert (killed.stage, killed.made_with, killed.seed) == ("grpo", "dapo", 3)
    assert (killed.seconds, killed.ended, killed.figures) == (None, None, {})
    assert killed in found["runs/demo/sft"].children


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    os.write(handle, b"process 12 on here")
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


def test_a_run_that_is_being_written(chain: None) -> None:
    with locked(Path("runs/demo/ppo")):
        assert by_folder("runs")["runs/demo/ppo"].state == "running (process 12 on here)"
    assert by_folder("runs")["runs/demo/ppo"].state == "finished"


@pytest.mark.parametrize(
    "content",
    [
        *('{"stage": "sft", "com', "[1]", "\xff", '{"parents": 3}', '{"parents": {"policy": "x"}}'),
        *('{"inputs": {"": {"path": "x", "hash": "y"}}}', '{"parents": {"policy": {"path": 1}}}'),
    ],
)
def test_a_damaged_manifest_is_said_and_the_others_are_shown(
    content: str, chain: None, cli: Cli
) -> None:
    Path("runs/demo/reward/stage.json").write_bytes(content.encode("latin-1"))
    done = cli("ls", "runs")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if "reward  " in line[:26])
    assert cells(line)[3] == "damaged"
    assert "runs/demo/ppo" in done.stdout


def test_folders_of_others_and_parts_of_runs(chain: None) -> None:
    """Of all that lies below, only what a stage finished or began is a run."""
    write_run("runs/demo/sweep/0", "dpo -m algo=dpo,ipo", {"policy": "runs/demo/sft"})
    Path("runs/demo/sweep/multirun.yaml").write_text("a: 1")
    write_run("runs/it", "grpo algo=grpo_iterative", {"policy": "runs/demo/sft"})
    write_run("runs/it/reward", "grpo", {"policy": "runs/demo/sft"})
    Path("runs/it/reward/config.yaml").unlink()  # a refreshed reward model has none
    for name in ("bootstrap", ".staging", "checkpoints/step-1", "other"):
        Path(f"runs/it/{name}").mkdir(parents=True)
    Path("runs/it/other/config.yaml").write_text("mine: 1\n")
    Path("runs/it/.staging/stage.json").write_text("{}")
    Path("runs/foreign").mkdir()
    Path("runs/foreign/stage.json").write_text('{"stage": "build", "parents": {}, "seconds": "x"}')
    found = by_folder("runs")
    assert {name for name in found if "demo" not in name} == {
        *("runs/it", "runs/it/reward", "runs/foreign")
    }
    assert found["runs/it"].children == [found["runs/it/reward"]]
    assert found["runs/it/reward"].made_with == "grpo_iterative"
    assert found["runs/demo/sweep/0"].made_with is None  # each job has its own
    foreign = found["runs/foreign"]
    assert (foreign.stage, foreign.state, foreign.seconds) == (None, "damaged", None)


def test_runs_that_were_made_from_each_other(chain: None) -> None:
    """No order of overwriting makes a tree without a root."""
    write_run("runs/demo/sft", "sft", {"model": "runs/demo/ppo"})
    assert len(by_folder("runs")) == 5


def test_no_folder(cli: Cli, tmp_path: Path) -> None:
    done = cli("ls", "runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "rlhf-cli: error: ls runs: no folder runs; give the folders that hold your runs\n"
    )
    done = cli("ls", "runs", ".")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no runs in .\n")


def test_it_imports_no_torch(chain: None) -> None:
    code = "import sys; from rlhf_cli.commands.ls import run; run(['runs']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "rlhf_cli.runs.lineage" in modules
    assert not {"torch", "transformers", "hydra"} & set(modules)


def test_completion(cli: Cli) -> None:
    assert cli("completion", "query", COMP_LINE="rlhf-cli ls r").stdout == "recipes \nruns \n"
    assert cli("completion", "query", COMP_LINE="rlhf-cli ls runs ").stdout.strip() == ""


def test_a_group_that_is_none_names_runs(chain: None) -> None:
    with pytest.raises(UserError, match="did you mean runs?"):
        ls.run(["run"])
