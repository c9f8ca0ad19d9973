"""One command as several processes: how it ends, what is said, and that nothing is left behind.

The stage is a body of a few lines that joins the ranks, and so starts within seconds.
"""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import pytest

# Found by every Python that is started with this folder in PYTHONPATH, so in each worker.
PUT_IN = """
import sys
from importlib.util import spec_from_file_location

class Stage:
    def find_spec(self, name, path=None, target=None):
        if name in ("rlhf_cli.stages.sft", "rlhf_cli.stages.generate"):
            return spec_from_file_location(name, {file!r})

sys.meta_path.insert(0, Stage())
"""
STAGE = """
import os, signal, sys, time
from pathlib import Path
import torch
from rlhf_cli.config.errors import Interrupted, RunError, UserError
from rlhf_cli.ranks.worker import join_others
from rlhf_cli.ranks.world import world
from rlhf_cli.runs import interrupts

def run(cfg, plan):
    from rlhf_cli.reporting.console import say
    join_others(torch.device("cpu"), cfg.hardware.rank_timeout, say)
    rank = world().rank
    print("printed by", rank)
    print("said by", rank, file=sys.stderr)
    Path(f"pid-{{rank}}").write_text(str(os.getpid()))
{body}
    return Path(cfg.out)
"""
AT_START = ("sft: Supervised", "out: ", "loading PyTorch")
ROWS = "".join(f'{{"prompt": "{each}", "completion": "b"}}\n' for each in "aceg")
SFT = "sft data=jsonl data.path=rows.jsonl data.eval_rows=1"


class Runs:
    """Starts `rlhf-cli sft`, or generate, with a body in its place, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rows.jsonl").write_text(ROWS)
        (folder / "tmp").mkdir()
        (folder / "put").mkdir()
        self.stage = folder / "put" / "stage.py"
        self.put_in = folder / "put" / "sitecustomize.py"
        self.put_in.write_text(PUT_IN.format(file=str(self.stage)))
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self,
        body: str,
        *words: str,
        stage: str = SFT,
        agent: tuple[str, ...] = (),
        stdin: int | IO[str] = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
    ) -> "subprocess.Popen[str]":
        """Two ranks, unless `words` say otherwise; `agent` starts them instead of our own."""
        self.stage.write_text(STAGE.format(body=textwrap.indent(textwrap.dedent(body), "    ")))
        own = () if agent else ("hardware.processes=2",)
        path = os.pathsep.join([str(self.put_in.parent), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *agent, "rlhf_cli", *stage.split(), *own, *words],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "TMPDIR": str(self.folder / "tmp"),
                **(env or {}),
            },
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def __call__(self, body: str, *words: str, **more: object) -> tuple[int, str, str]:
        """Exit status, stdout and stderr; no worker outlives the command."""
        return self.end(self.start(body, *words, **more))  # type: ignore[arg-type]

    def end(self, process: "subprocess.Popen[str]") -> tuple[int, str, str]:
        """The same of one that was started; without what a stage says as it starts."""
        out, err = process.communicate(timeout=150)
        assert self.left() == []
        said = [line for line in err.splitlines(True) if not line.startswith(AT_START)]
        return process.returncode, out, "".join(said)

    def pid(self, rank: int) -> int:
        """Of a rank that has joined."""
        file = self.folder / f"pid-{rank}"
        for _ in range(600):
            if file.is_file() and file.read_text():
                return int(file.read_text())
            time.sleep(0.1)
        raise AssertionError(f"rank {rank} did not join")

    def left(self) -> list[int]:
        """Processes of ranks that are still there, soon after the command ended."""
        pids = [int(file.read_text()) for file in self.folder.glob("pid-*")]
        for _ in range(50):
            alive = [pid for pid in pids if _is_alive(pid)]
            if not alive:
                break
            time.sleep(0.1)
        return alive

    def logs(self) -> list[Path]:
        """What is left in the folder for temporary files."""
        return [file for file in (self.folder / "tmp").rglob("*.log") if file.is_file()]


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    each = Runs(tmp_path)
    yield each
    for process in each.started:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_two_ranks_are_one_command(runs: Runs) -> None:
    code, out, err = runs("assert world().any(rank == 1) and world().size == 2")
    assert (code, out) == (0, "printed by 0\nruns/demo/sft\n"), err
    assert err == "said by 0\n"
    assert runs.logs() == [] and list((runs.folder / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        # every rank raises the same: it is told once, as of one process
        ("raise UserError('rows are odd')", 2, "rows are odd"),
        ("raise RunError('loss is nan')", 1, "loss is nan"),
        # one rank does, and the others lose it
        ("if rank: raise UserError('odd here')\nworld().any(True)", 2, "rank 1: odd here"),
        ("if rank: sys.exit(3)\nworld().any(True)", 3, "rank 1 left with exit status 3"),
        (
            "if rank: os.kill(os.getpid(), signal.SIGKILL)\nworld().any(True)",
            1,
            "rank 1 was ended by SIGKILL, by hand or for want of memory",
        ),
        ("if rank == 0: os._exit(7)\nworld().any(True)", 7, "rank 0 left with exit status 7"),
    ],
)
@pytest.mark.slow
def test_the_first_cause_is_one_line(runs: Runs, body: str, code: int, line: str) -> None:
    done, out, err = runs(body)
    assert done == code, err
    assert out == "printed by 0\n"
    assert err.startswith("said by 0\n") and len(err.splitlines()) == 2, err
    assert (
        err.splitlines()[-1].partition(" (what it said before: ")[0] == f"rlhf-cli: error: {line}"
    )


@pytest.mark.slow
def test_an_unforeseen_error_names_the_file_of_its_rank(runs: Runs) -> None:
    code, _, err = runs("if rank: raise ValueError('odd')\nworld().barrier('never')")
    assert code == 1
    assert "rank 1: ValueError: odd" in err and len(err.splitlines()) == 2
    (log,) = runs.logs()
    assert str(log) in err and "said by 1" in log.read_text()


SLOWLY = """
interrupts.wait_for_steps()
for step in range(600):
    time.sleep(0.1)
    asked = interrupts.asked()
    if world().any(asked is not None):
        Path(f"saved-{rank}").write_text("")
        time.sleep(2 * (rank == 0))
        raise Interrupted(f"{asked}: saved after step {step}; the same command goes on")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_lets_all_ranks_save(runs: Runs, number: signal.Signals) -> None:
    process = runs.start(SLOWLY)
    runs.pid(0), runs.pid(1)
    time.sleep(0.5)
    process.send_signal(number)
    code, out, err = runs.end(process)
    assert code == 75, err
    assert (runs.folder / "saved-0").exists() and (runs.folder / "saved-1").exists()
    said, first, last = err.splitlines()
    assert first == (
        f"{number.name}: a step that is under way is finished and saved first; Ctrl-C ends at once"
    )
    assert last.startswith(f"rlhf-cli: {number.name}: saved after step ")
    assert runs.logs() == []


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_at_once(runs: Runs) -> None:
    process = runs.start("interrupts.wait_for_steps()\ntime.sleep(100)")
    runs.pid(0), runs.pid(1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = runs.end(process)
    assert code == 130 and time.monotonic() - began < 3
    assert err.splitlines()[-1] == "ended at once; what was saved before is whole"
    assert list((runs.folder / "tmp").iterdir()) == []


@pytest.mark.slow
def test_no_rank_outlives_its_agent(runs: Runs) -> None:
    process = runs.start("time.sleep(100)")
    runs.pid(0), runs.pid(1)
    process.kill()
    runs.end(process)


@pytest.mark.slow
def test_dead_ranks_are_started_again(runs: Runs) -> None:
    """Twice at most, and no error of the user's."""
    body = """
        life = Path(f"life-{rank}")
        lives = life.read_text() if life.exists() else ""
        life.write_text(lives + "x")
        if rank == 1 and len(lives) < 2:
            os.kill(os.getpid(), signal.SIGKILL)
        world().any(True)
        if rank == 0 and Path("wrong").exists():
            raise UserError("wrong")
    """
    code, out, err = runs(body, "hardware.max_restarts=2")
    assert code == 0, err
    assert (runs.folder / "life-1").read_text() == "xxx"
    assert err.count("all ranks are started again") == 2
    assert "rank 1 was ended by SIGKILL" in err and "(2 of 2), from the start" in err
    (runs.folder / "wrong").touch()
    code, out, err = runs(body, "hardware.max_restarts=2")
    assert (code, err.count("started again")) == (2, 0)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(runs: Runs) -> None:
    body = """
        world().any(False)
        if rank:
            time.sleep(100)
        world().barrier("all have read")
    """
    code, _, err = runs(body, "hardware.rank_timeout=6")
    assert code == 1
    said, note, last = err.splitlines()
    assert "waited" in note and "for rank 1, which is in" in note
    assert "time.sleep" not in note and "(all have read); the run ends after 6 s" in note
    assert "(all have read); hardware.rank_timeout=6 is over" in last


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_others_hears_signals(rank: int, runs: Runs) -> None:
    """Whether it keeps the meeting place or looks for it; and whoever has not come is named."""
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    one = "hardware.processes=1"
    late = runs.start("pass", one, "hardware.rank_timeout=4", env=env)
    waits = runs.start("pass", one, env={**env, "MASTER_PORT": str(free_port())})
    code, _, err = runs.end(late)
    note, last = err.splitlines()
    other = f"s for rank {1 - rank}"
    assert code == 1 and "waited" in note and other in note and "run ends after 4 s" in note
    assert f"rank {rank} of 2 at 127.0.0.1:{env['MASTER_PORT']} waited" in last and other in last
    assert "(hardware.rank_timeout=4)" in last
    waits.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, _, err = runs.end(waits)
    assert code == 75 and time.monotonic() - began < 5
    assert rank or err.splitlines()[-1].startswith("rlhf-cli: interrupted by SIGTERM")


@pytest.mark.slow
def test_work_of_rank_0_may_take_longer_than_ranks_wait(runs: Runs) -> None:
    """As a user's reward function or a server does; its error is that of all."""
    body = """
        from rlhf_cli.ranks.agreement import by_main
        def judge():
            time.sleep(9)
            if Path("odd").exists():
                raise RunError("odd judge")
            return [1.5]
        assert by_main(judge) == [1.5]
        own = world().lead(lambda: time.sleep(5) or rank, leads=rank == 1)
        assert own == (1 if rank else None)
        assert world().any(rank == 1)
    """
    code, _, err = runs(body, "hardware.rank_timeout=4")
    assert code == 0, err
    first, second = (line for line in err.splitlines() if line.startswith("waited"))
    assert "for rank 0, which is in" in first and "for rank 1, which is in" in second
    assert "(work for all)" in first and "run ends" not in err
    (runs.folder / "odd").touch()
    code, _, err = runs(body, "hardware.rank_timeout=4")
    assert code == 1 and err.splitlines()[-1] == "rlhf-cli: error: odd judge"


@pytest.mark.slow
def test_torchrun_starts_the_same_ranks(runs: Runs) -> None:
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
    code, out, err = runs("assert world().size == 2", agent=torchrun)
    assert (code, out) == (0, "printed by 0\nruns/demo/sft\n"), err
    body = "if rank: raise UserError('odd here')\nworld().any(True)"
    code, out, err = runs(body, agent=torchrun)
    assert code == 1
    assert [line for line in err.splitlines() if line.startswith("rlhf-cli")] == [
        "rlhf-cli: error: rank 1: odd here"
    ]


@pytest.mark.slow
def test_two_agents_on_one_host_are_two_nodes(runs: Runs) -> None:
    """The words are the same on each, and so are the causes that they end with."""
    port = free_port()
    body = "assert world().size == 2 and world().local_size == 1\nworld().any(True)\n"
    body += "if Path('odd').exists() and rank: raise UserError('odd here')\nworld().any(True)"
    node = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x")
    met = ("--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost")
    agent = ("torch.distributed.run", *node, *met, "-m")
    nodes = [runs.start(body, agent=agent) for _ in range(2)]
    ended = [runs.end(each) for each in nodes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert sorted(out for _, out, _ in ended) == ["", "printed by 0\nruns/demo/sft\n"]
    (runs.folder / "odd").touch()
    nodes = [runs.start(body, agent=agent) for _ in range(2)]
    ended = [runs.end(each) for each in nodes]
    said = [line for _, _, err in ended for line in err.splitlines() if line[:8] == "rlhf-cli"]
    assert said == ["rlhf-cli: error: rank 1: odd here"]


@pytest.mark.slow
def test_tasks_of_srun_are_ranks(runs: Runs) -> None:
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    body = "assert world().size == world().local_size == 2\nworld().any(True)\n"
    body += "if Path('odd').exists(): raise RunError('odd')"
    for code in (0, 1):
        tasks = [
            runs.start(
                body,
                "hardware.processes=1",
                env={**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            )
            for rank in "01"
        ]
        ended = [runs.end(each) for each in tasks]
        assert [status for status, _, _ in ended] == [code, code], ended
        assert ended[0][2].splitlines()[1:] == ["rlhf-cli: error: odd"][:code]
        assert ended[1][1:] == ("", "")
        (runs.folder / "odd").touch()


READS = """
from rlhf_cli.data.stdin import stdin_lines
world().any(True)
Path(f"read-{rank}").write_text("".join(stdin_lines()))
"""


@pytest.mark.slow
def test_rows_of_a_pipe_reach_every_rank(place: Path) -> None:
    runs = Runs(place)
    generate = "generate policy=runs/demo/sft data=jsonl data.path=-"
    with (place / "rows.jsonl").open() as rows:
        code, _, err = runs(READS, stage=generate, stdin=rows)
    assert code == 0, err
    for rank in range(2):
        assert (runs.folder / f"read-{rank}").read_text() == ROWS
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
    with (runs.folder / "rows.jsonl").open() as rows:
        code, _, err = runs(READS, stage=generate, agent=torchrun, stdin=rows)
    said = [line for line in err.splitlines() if line[:8] == "rlhf-cli"]
    assert code == 1 and len(said) == 1 and "cannot read one standard input; give a file" in said[0]


@pytest.mark.slow
def test_each_job_of_a_sweep_has_its_ranks(runs: Runs) -> None:
    body = "world().any(True)\nif cfg.seed == 2: raise RunError('odd')"
    code, out, err = runs(body, "-m", "seed=1,2,3")
    places = [f"runs/demo/sft/seed={seed}" for seed in (1, 3)]
    assert [line for line in out.splitlines() if line[:4] == "runs"] == places, err
    assert code == 1 and "job 2 of 3, out=runs/demo/sft/seed=2: error: odd" in err


@pytest.mark.slow
def test_runs_beside_each_other_do_not_meet(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Runs(tmp_path_factory.mktemp("other"))
    body = "for _ in range(20): assert world().size == 2 and world().any(True); time.sleep(0.05)"
    both = [each.start(body) for each in (runs, other)]
    for each, process in zip((runs, other), both, strict=True):
        code, out, err = each.end(process)
        assert (code, out.splitlines()[-1]) == (0, "runs/demo/sft"), err


def test_what_is_wrong_is_said_before_any_rank_starts(runs: Runs) -> None:
    (runs.folder / "rows.jsonl").write_text("{")
    code, out, err = runs("assert False")
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "rows.jsonl" in err
    assert list(runs.folder.glob("pid-*")) == list((runs.folder / "tmp").iterdir()) == []


ALONE = """
import sys
sys.argv = ["rlhf-cli", "sft", "data=jsonl", "data.path=rows.jsonl", "data.eval_rows=1"]
from rlhf_cli.cli import main
status = main()
unused = ("rlhf_cli.ranks.group", "rlhf_cli.ranks.watch", "torch.distributed.elastic")
print([each for each in sys.modules if each.startswith(unused)])
sys.exit(status)
"""


def test_one_process_loads_nothing_of_this(runs: Runs) -> None:
    runs.stage.write_text("from pathlib import Path\ndef run(cfg, plan): return Path(cfg.out)")
    path = os.pathsep.join([str(runs.put_in.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=runs.folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "[]"


def free_port() -> int:
    """One that nobody has at this moment."""
    with socket.socket() as each:
        each.bind(("localhost", 0))
        port: int = each.getsockname()[1]
        return port
