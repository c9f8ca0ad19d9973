"""Standard streams that are closed, full, of another kind, or read by nobody."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import DATA

pytestmark = [pytest.mark.usefixtures("inside"), pytest.mark.slow]
GENERATE = ["generate", *DATA, "policy=runs/demo/sft", "algo.prompts=2", "reward=length:5"]


def shell(words: list[str], streams: str) -> "subprocess.CompletedProcess[str]":
    script = str(Path(sys.executable).with_name("rlhf-cli"))
    line = f"{shlex.join([script, *words])} {streams}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        (">&-", "is written; stdout did not take its path: it is closed"),
        (">/dev/full", "is written; stdout did not take its path: No space left on device"),
        ("> >(exec true)", "is written; stdout did not take its path: Broken pipe"),
        (">&- 2>&-", ""),
        ("2>&-", ""),
        ("<&- 2>/dev/full", ""),
    ],
)
def test_what_is_done_is_done_whatever_stdout_is(
    streams: str, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = shell([*GENERATE, f"out={out}"], streams)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "stage.json").read_text())["complete"]
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stdout == (f"{out}\n" if ">" not in streams.replace("2>", "") else "")
    again = shell([*GENERATE, f"out={out}"], streams)  # finished before, and told without torch
    assert again.returncode == 0 and message in again.stderr


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ("<&-", "standard input is closed; pipe the prompts in"),
        ("0>/dev/null", "standard input cannot be read"),
        ("</dev/null", "no usable prompt row"),
        ("< <(printf '\\xff\\n')", "stdin"),
    ],
)
def test_prompts_that_do_not_come_are_one_line(streams: str, message: str, tmp_path: Path) -> None:
    done = shell([*GENERATE, "data.path=-", f"out={tmp_path}/out"], streams)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and done.stdout == ""
    assert last.startswith("rlhf-cli: error: ") and message in last
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
