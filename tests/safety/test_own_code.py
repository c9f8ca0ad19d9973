"""A user's Python files run where the config names them, and nowhere else."""

from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.tiny import DATA

MARKER = "IT_RAN"
PLANTED = f"open({MARKER!r}, 'w')\n"
SCORE = PLANTED + "def score(prompts, responses):\n    return [1.0] * len(prompts)\n"
GENERATE = [
    *("generate", *DATA, "algo.prompts=2", "algo.max_tokens=4", "policy=runs/demo/sft", "out=new")
]
# modules that we, our libraries and Python itself import
SHADOWED = (
    *("torch", "yaml", "json", "transformers", "hydra", "rlhf_cli", "rewards", "conf"),
    *("sitecustomize", "usercustomize", "math_verify", "peft", "conftest", "setup"),
)


@pytest.mark.slow
def test_a_reward_file_runs_where_it_is_named(cli: Cli, place: Path) -> None:
    for folder in ("", "runs/", "runs/demo/sft/", "own/", "own/algo/"):
        (place / folder).mkdir(exist_ok=True)
        (place / folder / "mine.py").write_text(SCORE)
    named = [*GENERATE, "reward=mine.py:score"]
    checked = cli(*named, "--check", "--config-dir", "own")
    assert checked.returncode == 0, checked.stderr
    assert "what score of mine.py gives each response" in checked.stderr
    assert cli(*named, "--help").returncode == 0
    assert cli(*GENERATE, "reward=regex:mine.py", "--config-dir", "own").returncode == 0
    assert not (place / MARKER).exists()

    done = cli(*named, "out=other")
    assert done.returncode == 0, done.stderr
    assert (place / MARKER).exists()


@pytest.mark.parametrize("words", [["sft", "--check"], ["ls"], ["ls", "runs"], ["ppo", "--help"]])
def test_modules_where_a_command_is_run_are_not_imported(
    words: list[str], cli: Cli, tmp_path: Path
) -> None:
    shadow(tmp_path)
    (tmp_path / "runs").mkdir()
    assert cli(*words).returncode == 0
    assert not (tmp_path / MARKER).exists()


def test_modules_where_a_stage_is_run_are_not_imported(cli: Cli, place: Path) -> None:
    """The answers of rows are compared by a process of its own, too."""
    shadow(place)
    rows = '{"prompt": "1 + 1 = ", "answer": "2"}\n' * 2
    (place / "rows.jsonl").write_text(rows)
    done = cli(*GENERATE, "data.eval_rows=1", "reward=math_answer")
    assert done.returncode == 0, done.stderr
    assert not (place / MARKER).exists()


def shadow(folder: Path) -> None:
    """Modules, and a package of plugins as Hydra looks for them."""
    for name in SHADOWED:
        (folder / f"{name}.py").write_text(PLANTED)
    (folder / "hydra_plugins").mkdir()
    (folder / "hydra_plugins/mine.py").write_text(PLANTED)
