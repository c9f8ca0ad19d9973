"""`rlhf-cli slurm`: the text of a job, and what bash makes of it with fakes of SLURM's commands."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli.commands import completion, slurm
from rlhf_cli.config.errors import RunError, UserError
from tests.pace import fast

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=rlhf-sft
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --dependency=afterok:17
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --qos=long
#SBATCH --exclude=bad01

module load cuda
source venv/bin/activate

asked=
again=1
status=1
stop() {
    asked=1 again=1
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1 TERM

srun --kill-on-bad-exit=1 --cpus-per-task=12 rlhf-cli sft 'data.template="$ {prompt}"' &
while [ "$again" ]; do
    again=
    wait "$!"
    status=$?
done

# 75: interrupted, and what was done is saved. Above 128: srun ended who was late after a signal.
# A job that was cancelled is no longer running, and stays so.
if [ "$status" = 75 ] || { [ "$asked" ] && [ "$status" -gt 128 ]; }; then
    case "$(scontrol show job "$SLURM_JOB_ID")" in
    *JobState=RUNNING*) scontrol requeue "$SLURM_JOB_ID" ;;
    esac
fi
exit "$status"
"""
ASKED = [
    *("--partition=gpu", "--account", "lab", "--time=24:00:00", "--nodes=2", "--gpus=8"),
    *("--cpus=12", "--mem=0", "--warn=600", "--after=17"),
    *("--sbatch=--qos=long", "--sbatch=#SBATCH --exclude=bad01"),
    *("--setup=module load cuda", "--setup=source venv/bin/activate"),
]
FAKES = {
    # notes its words; STATUS, after WAITS seconds or SIGTERM
    "srun": """
        printf '%s\\0' "$@" > words; echo $$ > pid
        if [ "$WAITS" ]; then
            trap 'sleep 0.2; exit $STATUS' TERM
            for _ in $(seq 100); do sleep 0.1; done
        fi
        exit $STATUS""",
    "scontrol": """
        case "$2" in
        job) echo "JobId=$3 JobState=$STATE Reason=None" ;;
        *) echo "$@" >> requeued ;;
        esac""",
    "scancel": 'echo "$@" > cancelled; [ "$DEAF" ] || kill -TERM "$(cat pid)"',
    "sbatch": 'cat > submitted; echo "$@" > how; echo "$SAYS" >&2; echo "4711;big"; exit $STATUS',
    "rlhf-cli": "exit 1",
}


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and SLURM's commands beside it."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in {"STATUS": "0", "STATE": "RUNNING", "SLURM_JOB_ID": "4711"}.items():
        monkeypatch.setenv(name, value)
    return work


@pytest.fixture
def rendered(capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., str]:
    """Words -> the job that --check prints."""

    def of(*words: str) -> str:
        slurm.run(["sft", "--check", *words])
        return os.fsdecode(capfdbinary.readouterr().out)

    return of


def submit(script: str) -> subprocess.Popen[bytes]:
    """A job as SLURM starts it."""
    return subprocess.Popen(["bash", "-c", script], env=os.environ, stderr=subprocess.PIPE)


def appears(name: str) -> None:
    deadline = time.monotonic() + 20
    while not Path(name).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert Path(name).exists()


def test_the_text_of_a_job(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    slurm.run(["sft", *ASKED, "--check", 'data.template="$ {prompt}"'])
    shown = capfdbinary.readouterr()
    assert shown.out.decode() == GOLDEN
    assert b"after job 17" in shown.err


def test_processes_of_a_machine(rendered: Callable[..., str]) -> None:
    """Where they meet is no matter of the job's: each finds it in what srun says."""
    script = rendered()
    assert "--nodes=1\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=1\n" in script
    cpu = rendered("--gpus=0", "--processes=4")
    assert "--ntasks-per-node=4" in cpu and "gpus-per-node" not in cpu
    assert "MASTER" not in script + cpu


ODD = [
    "name=a b",
    'data.template=It\'s {prompt}\\n"so" $HOME `id` \\$x !1 #x',
    "data.path=naïve *.jsonl",
    "data.columns={prompt: a$b}",
    "model.chat=\nsecond line; exit 9",
    "out=~/x&y|z>w",
    "reward=",
    "name=\udcff",  # a byte that is no text
]


def test_words_reach_the_stage_as_they_were_typed() -> None:
    """Under bash: spaces, quotes, dollar signs, line breaks, patterns, bytes that are no text."""
    order, _ = slurm.parse(["sft", "--gpus=2", "--nodes=2"])
    script = slurm.rendered(order, ["rlhf-cli", "sft", *ODD])
    done = submit(script)
    assert done.wait(20) == 0
    assert not Path("requeued").exists()
    words = Path("words").read_bytes().split(b"\0")[:-1]
    assert words == [b"--kill-on-bad-exit=1", *map(os.fsencode, ["rlhf-cli", "sft", *ODD])]


def test_the_command_is_this_programs_where_no_path_leads_to_it(
    rendered: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "programs/rlhf-cli").unlink()
    os.environ["PATH"] = f"{tmp_path}/programs:/usr/bin:/bin"
    assert "-m rlhf_cli sft" in rendered()
    assert " rlhf-cli sft" in rendered("--setup=source venv/bin/activate")


@pytest.mark.parametrize(
    ("status", "state", "comes_back"),
    [
        ("75", "RUNNING", True),
        ("75", "COMPLETING", False),  # somebody cancelled it
        ("0", "RUNNING", False),
        ("1", "RUNNING", False),
        ("2", "RUNNING", False),
        ("137", "RUNNING", False),  # killed, and nobody had asked for an end
    ],
)
def test_a_job_is_queued_again_where_a_signal_ended_it(
    status: str,
    state: str,
    comes_back: bool,
    rendered: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STATUS", status)
    monkeypatch.setenv("STATE", state)
    assert submit(rendered()).wait(20) == int(status)
    assert Path("requeued").exists() == comes_back
    if comes_back:
        assert Path("requeued").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("status", fast(["75", "0"], ["75", "137", "0", "1"]))
def test_before_its_time_is_up_processes_finish_their_step(
    number: signal.Signals,
    status: str,
    rendered: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are sent SIGTERM and waited for; 137 is of those who were late. One that finished
    meanwhile, or failed, does not come back.
    """
    monkeypatch.setenv("WAITS", "1")
    monkeypatch.setenv("STATUS", status)
    job = submit(rendered())
    appears("pid")
    time.sleep(0.1)  # its trap is set
    job.send_signal(number)
    assert job.wait(20) == int(status)
    assert Path("cancelled").read_text() == "--signal=TERM 4711\n"
    assert Path("requeued").exists() == (status in ("75", "137"))


def test_submitting(
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    rendered: Callable[..., str],
) -> None:
    """The job's number is all of standard output, as another job's --after takes it."""
    slurm.run(["sft", "name=mine"])
    assert capfdbinary.readouterr().out == b"4711\n"
    assert Path("how").read_text() == "--parsable\n"
    assert Path("submitted").read_text() == rendered("name=mine")
    monkeypatch.setenv("STATUS", "1")
    monkeypatch.setenv("SAYS", "sbatch: error: invalid partition")
    with pytest.raises(RunError, match="sbatch refuses: sbatch: error: invalid partition$"):
        slurm.run(["sft"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no sbatch on this machine; --check prints the job"):
        slurm.run(["sft", "--setup=x"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: STAGE"),
        (["sfd"], "unknown stage sfd; did you mean sft?"),
        (["sft", "--partitoin=x"], "unknown flag --partitoin=x"),
        (["sft", "--partition=a b"], "expected a name, got a b"),
        (["sft", "--time=tomorrow"], "expected a time as 24:00:00 or 2-12, got tomorrow"),
        (["sft", "--mem=lots"], "expected a size as 200G"),
        (["sft", "--nodes=0"], "expected 1 or more, got 0"),
        (["sft", "--sbatch=qos"], "expected an option as --qos=long, got qos"),
        (["sft", "--setup=a\nb"], "expected one line"),
        (["sft", "--processes=4"], "--processes is for --gpus=0"),
        (["sft", "algo.lrr=1"], "algo.lr"),
        (["sft", "hardware.processes=4"], "srun starts the processes, 1 x 1"),
        (["generate", "data.path=-", "policy=x"], "a job has no standard input"),
        (["ppo"], "run `rlhf-cli sft` first"),
        (["sft", "-m"], "unknown flag -m"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        slurm.run(words)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("submitted").exists()


def test_completion_knows_flags_and_the_words_of_the_stage() -> None:
    found = completion.candidates
    assert "sft " in found("rlhf-cli slurm ")
    assert found("rlhf-cli slurm ppo --par") == ["--partition="]
    assert found("rlhf-cli slurm ppo --che") == ["--check "]
    assert "algo=ppo_ptx " in found("rlhf-cli slurm ppo --nodes=2 algo=")


TWO_TASKS = """
    while [[ "$1" == --* ]]; do shift; done
    pids=()
    for task in 0 1; do
        SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 \\
            SLURM_STEP_NODELIST=localhost SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
        pids+=($!)
    done
    echo "${pids[@]}" > pid
    worst=0
    for pid in "${pids[@]}"; do
        wait "$pid"
        status=$?
        ((status > worst)) && worst=$status
    done
    exit $worst"""


@pytest.mark.slow
def test_a_job_of_two_tasks_is_interrupted_and_goes_on(
    tmp_path: Path, rendered: Callable[..., str]
) -> None:
    """The stage itself, in two processes that find their ranks in what SLURM says."""
    own = {
        "srun": TWO_TASKS,
        "scancel": "kill -TERM $(cat pid)",
        "rlhf-cli": f'exec {sys.executable} -m rlhf_cli "$@"',
    }
    for name, text in own.items():
        (tmp_path / "programs" / name).write_text(f"#!/bin/bash\n{text}\n")
    words = ["--gpus=0", "--processes=2", "model.hidden_size=32", "model.layers=1", "out=made"]
    words += ["algo.epochs=100", "algo.max_steps=1000", "algo.eval_every=500", "hardware=cpu"]
    job = submit(rendered(*words))
    lines = Path("made/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_text().count("\n") > 1):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 75
    assert Path("requeued").read_text() == "requeue 4711\n"
    before = [json.loads(line)["step"] for line in lines.read_text().splitlines()]
    assert before[-1] < 900
    assert submit(rendered(*words)).wait(240) == 0
    assert Path("requeued").read_text() == "requeue 4711\n"
    steps = [json.loads(line)["step"] for line in lines.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[: len(before)] == before and steps[-1] == 1000
    assert json.loads(Path("made/stage.json").read_text())["complete"]
