"""Stages that sample go on where they were: nothing is sampled or scored twice, same bytes."""

import contextlib
import importlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.evaluation import kept
from rlhf_cli.evaluation.kept import SamplesOfPolicy
from rlhf_cli.rewards.reward import Reward
from rlhf_cli.rollout.slot_sampler import SlotSampler
from rlhf_cli.runs.out_files import KEPT, what_is_kept
from tests.contents import contents_of, faults_of
from tests.faults.killing import SAMPLING
from tests.tiny import DATA

pytestmark = pytest.mark.usefixtures("inside")
FUNCTION = """
from pathlib import Path
def f(prompts, responses):
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write(f"{len(responses)}\\n")
    return [len(response) / 3 if response else None for response in responses]
"""


class Killed(Exception):
    pass


def run(stage: str, out: Path, *more: str) -> Path:
    words = [*DATA, *SAMPLING[stage], f"out={out}", *more]
    made: Path = importlib.import_module(f"rlhf_cli.stages.{stage}").run(compose(stage, words))
    return made


def killed(stage: str, out: Path, *more: str, after: int = 2) -> None:
    """Ended after some groups."""
    keep = SamplesOfPolicy.keep
    left = after

    def keep_and_die(self: SamplesOfPolicy, made: Mapping[int, list[Any]]) -> None:
        nonlocal left
        keep(self, made)
        left -= 1
        if not left:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(SamplesOfPolicy, "keep", keep_and_die)
        run(stage, out, *more)
        pytest.fail("it ended before")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many responses were asked of the slots each time."""
    counts: list[int] = []
    draw = SlotSampler.draw

    def counted(self: SlotSampler, model: Any, jobs: list[Any], *rest: Any) -> Any:
        counts.append(len(jobs))
        return draw(self, model, jobs, *rest)

    monkeypatch.setattr(SlotSampler, "draw", counted)
    return counts


def same(ours: Path, theirs: Path) -> None:
    left, right = contents_of(ours), contents_of(theirs)
    del left["config.yaml"], right["config.yaml"]  # each names its own folder
    assert left == right
    assert (ours / "samples.jsonl").read_bytes() == (theirs / "samples.jsonl").read_bytes()
    assert not faults_of(ours)


@pytest.mark.parametrize("more", [[], ["algo.samples=3"], ["algo.beams=2", "algo.temperature=1"]])
def test_no_prompt_is_sampled_twice(more: list[str], tmp_path: Path, decoded: list[int]) -> None:
    whole, out = run("generate", tmp_path / "whole", *more), tmp_path / "out"
    once = list(decoded)
    decoded.clear()
    killed("generate", out, *more)
    text = (out / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert what_is_kept(out) == f"{len(rows)} samples"
    assert {row["prompt"] for row in rows} < {each["prompt"] for each in _lines(whole)}
    run("generate", out, *more)
    assert decoded == once
    same(out, whole)


def test_evaluate_goes_on_within_each_policy(tmp_path: Path, decoded: list[int]) -> None:
    whole, out = run("evaluate", tmp_path / "whole"), tmp_path / "out"
    once = list(decoded)
    for after in (1, 2, 1, 2):
        decoded.clear()
        with contextlib.suppress(BaseException):
            killed("evaluate", out, after=after)
        assert len(decoded) < len(once)
    run("evaluate", out)
    same(out, whole)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_blocks_of_prompts_are_gone_on_from(
    after: int, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that holds few responses at a time, killed in any of its blocks."""
    from rlhf_cli.stages import generate

    monkeypatch.setattr(generate, "AT_ONCE", 4)
    words = ["algo.samples=2", "reward=length:5"]
    whole, out = run("generate", tmp_path / "whole", *words), tmp_path / "out"
    once = list(decoded)
    decoded.clear()
    killed("generate", out, *words, after=after)
    shown = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert all({"id", "prompt", "sample", "response", "row_chosen"} <= row.keys() for row in shown)
    run("generate", out, *words)
    assert decoded == once
    same(out, whole)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "forged"])
def test_damaged_samples_are_made_again(damage: str, tmp_path: Path) -> None:
    whole, out = run("generate", tmp_path / "whole"), tmp_path / "out"
    killed("generate", out)
    file = out / KEPT
    content = bytearray(file.read_bytes())
    match damage:
        case "flipped":
            content[len(content) // 2] ^= 1
        case "cut":
            del content[-40:]
        case "gone":
            content.clear()
        case _:
            lines = file.read_text().splitlines(keepends=True)
            lines[0] = re.sub(r'"response": "[^"]*"', '"response": "I am bad"', lines[0])
            content = bytearray("".join(lines).encode())
    file.write_bytes(content)
    run("generate", out)
    same(out, whole)


def test_no_response_is_scored_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that were scored before a kill; a changed function begins again."""
    monkeypatch.setattr(kept, "SCORED_AT_ONCE", 2)
    file, calls = tmp_path / "own.py", tmp_path / "calls"
    file.write_text(FUNCTION)
    reward = f"reward={file}:f"
    whole = run("generate", tmp_path / "whole", reward)
    once = calls.read_text()
    calls.unlink()
    out = tmp_path / "out"
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        score, left = Reward.score, 2

        def some(self: Any, rollouts: Any, by_step: bool) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return score(self, rollouts, by_step)

        patch.setattr(Reward, "score", some)
        run("generate", out, reward)
    run("generate", out, reward)
    assert calls.read_text() == once
    same(out, whole)


@pytest.mark.slow
def test_gold_that_has_changed_scores_again(tmp_path: Path) -> None:
    """Nothing else knows: gold goes into no weights, so it is nobody's parent."""
    gold, out = tmp_path / "gold", tmp_path / "out"
    shutil.copytree("runs/demo/reward", gold)
    killed("evaluate", out, f"gold={gold}", after=4)  # all of the first policy's, some of the next
    manifest = json.loads((gold / "stage.json").read_text())
    manifest["reward"]["mean"] += 1.0
    (gold / "stage.json").write_text(json.dumps(manifest))
    run("evaluate", out, f"gold={gold}")
    same(out, run("evaluate", tmp_path / "whole", f"gold={gold}"))


def test_other_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the hub has another version by now, which nothing watches."""
    out = tmp_path / "out"
    killed("generate", out)
    from rlhf_cli.data.tokens import Encoder

    prompts = Encoder.prompts
    monkeypatch.setattr(Encoder, "prompts", lambda self, rows: prompts(self, rows)[::-1])
    with pytest.raises(UserError, match="begun with other prompts than these"):
        run("generate", out)


def test_standard_input_goes_on_with_the_same_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"Greet {name}: \n" for name in ("Ana", "Bela", "Carl", "Dora", "Egon")]

    def piped(text: str, then: Callable[..., Any], out: Path) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        then("generate", out, "data.path=-")

    whole, out = tmp_path / "whole", tmp_path / "out"
    piped("".join(lines), run, whole)
    piped("".join(lines), killed, out)
    held = what_is_kept(out)
    capsys.readouterr()
    piped("".join(lines), run, out)
    assert held and f"goes on from {held}" in capsys.readouterr().err
    same(out, whole)
    other = "".join(lines[::-1])
    piped(other, killed, tmp_path / "other")
    piped("".join(lines), run, tmp_path / "other")
    assert "made anew" in capsys.readouterr().err
    same(tmp_path / "other", whole)


@pytest.mark.slow
def test_a_signal_ends_with_75_and_the_command_goes_on(tmp_path: Path) -> None:
    """As users meet it: the line that says so, --check, ls runs, and the same bytes."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": f"Greet {i}: "}) for i in range(3000)]
    prompts.write_text("\n".join(rows) + "\n")
    script = str(Path(sys.executable).with_name("rlhf-cli"))
    more = [f"data.path={prompts}", "algo.prompts=3000", "hardware.rollout_tokens=512"]

    def words(out: Path) -> list[str]:
        return [script, "generate", *DATA, *SAMPLING["generate"], *more, f"out={out}"]

    out, whole = tmp_path / "runs/out", tmp_path / "whole"
    with subprocess.Popen(words(out), stderr=subprocess.PIPE, text=True) as first:
        while not (out / KEPT).exists():
            time.sleep(0.01)
        first.send_signal(signal.SIGTERM)
        _, shown = first.communicate()
    assert first.returncode == 75
    assert "SIGTERM: what was sampled is kept; the same command goes on" in shown
    held = what_is_kept(out)
    assert held is not None and 0 < int(held.split()[0]) < 3000
    check = subprocess.run([*words(out), "--check"], capture_output=True, text=True)
    assert f"goes on from {held}" in check.stderr and check.returncode == 0
    listed = subprocess.run([script, "ls", "runs", out], capture_output=True, text=True).stdout
    assert f"unfinished at {held}" in listed
    for place in (out, whole):
        done = subprocess.run(words(place), capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout == f"{place}\n", done.stderr
    same(out, whole)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
