"""`rlhf-cli data STAGE`: what a stage will see of its rows."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from rlhf_cli.commands import data
from tests.tiny import DATA, WORDS

Cli = Callable[..., "CompletedProcess[str]"]

pytestmark = pytest.mark.usefixtures("inside")


def words(stage: str) -> list[str]:
    """The rows of a stage, and of sft the small model that is made from them."""
    model = [word for word in WORDS["sft"] if word.startswith("model.") and stage == "sft"]
    reward = ["reward=regex:a"] if stage in ("ppo", "grpo", "evaluate") else []
    return [*(word for word in DATA if word.startswith("data")), *model, *reward]


def test_what_dpo_will_see(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Counts, lengths as text and picture, and the first row in tokens."""
    data.run(["dpo", *words("dpo"), "--rows", "1", "--plot", str(tmp_path / "l.png")])
    out = capsys.readouterr().out
    assert "preference rows" in out and "held out" in out
    assert "prompt tokens: min " in out and "response tokens: min " in out
    assert out.count(" prompt: ") == 1 and "response 2: ⟦" in out  # without colours
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens with loss are those of the responses; rows say which text is what."""
    data.run(["sft", *words("sft"), "--rows", "2", "--json"])
    told = json.loads(capsys.readouterr().out)
    train = told["train"]
    assert train["tokens_with_loss"] == train["response_tokens"]["sum"] > 0
    assert train["prompt_tokens"]["min"] <= train["prompt_tokens"]["max"]
    assert len(told["rows"]) == 2
    (prompt, response) = told["rows"][0].values()
    assert {part["is"] for part in prompt} == {"prompt"}
    assert {part["is"] for part in response} == {"carries loss"}
    assert [part["special"] for part in response] == [False, True]  # the EOS is learnt


@pytest.mark.parametrize("stage", ["reward", "ppo", "grpo", "generate", "evaluate"])
def test_every_stage(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    data.run([stage, *words(stage), "policy=runs/demo/sft", "--json"])
    assert json.loads(capsys.readouterr().out)["train"]["items"] > 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data", "data: the following arguments are required: STAGE"),
        ("data spt", "data: unknown stage spt; did you mean sft?"),
        ("data dpo --jsn", "data: unknown flag --jsn"),
        ("data dpo data=rows data.path=gone.jsonl", "no such file: gone.jsonl"),
    ],
)
def test_what_is_wrong_is_one_line(cli: Cli, line: str, said: str) -> None:
    done = cli(*line.split())
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.count("\n") == 1


def test_bars_of_a_histogram() -> None:
    """Ten lengths in ranges of 1: as long as the greatest share of them."""
    lines = list(data.histogram([3, 3, 3, 3, 5]))
    assert lines == [f"3 to 3 {'█' * 40} 4", "4 to 4  0", f"5 to 5 {'█' * 10} 1"]
    ranges = [line.split(" █")[0] for line in data.histogram(range(100))]
    assert ranges[:2] == [" 0 to  8", " 9 to 17"] and ranges[-1] == "99 to 99"
