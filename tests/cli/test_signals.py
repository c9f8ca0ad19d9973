"""A signal ends the command with 75 from its first instruction to its last, whatever runs then."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(autouse=True)
def hung_up() -> Iterator[None]:
    """What is ignored stays ignored, and under nohup commands inherit that of SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# Sends itself a signal as a module is first asked for, in the midst of whoever imports it.
WHILE_IMPORTING = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv[0] = "rlhf-cli"
from rlhf_cli.cli import main
sys.exit(main())
"""

# A command whose stage is a body of a few lines.
STAGE = """
import os, sys, types
from pathlib import Path
from rlhf_cli.cli import main

def run(cfg, plan):
    from rlhf_cli.config.errors import Interrupted
    from rlhf_cli.runs import interrupts
{body}
    return Path(cfg.out)

def preflight(cfg, check_only):
    return types.SimpleNamespace(state="free", at_once=lambda: [])

for name, function in {{"stages.ppo": run, "runs.preflight": preflight}}.items():
    module = types.ModuleType(f"rlhf_cli.{{name}}")
    setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
sys.argv[0] = "rlhf-cli"
sys.exit(main())
"""
TERM = f"os.kill(os.getpid(), {int(signal.SIGTERM)})"


def python(code: str, *words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def ppo(body: str, *words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """`rlhf-cli ppo WORDS...` with this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return python(STAGE.format(body=lines), "ppo", *words, cwd=cwd)


@pytest.mark.parametrize(
    "module",
    [
        "rlhf_cli.config.stages",
        "hydra",
        "omegaconf",
        "yaml",
        "rich",
        "numpy",
        "torch._C",
        "torch.nn",
    ]
    + ["transformers", "transformers.generation.utils", "tokenizers", "safetensors.torch"],
)
@pytest.mark.slow
def test_a_signal_while_a_library_is_imported(module: str, tmp_path: Path) -> None:
    """Libraries turn what is raised there into errors of their own."""
    code = WHILE_IMPORTING.format(module=module, number=int(signal.SIGTERM))
    done = python(code, "sft", "out=out", cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    *begun, line = done.stderr.splitlines()
    assert line == "rlhf-cli: interrupted by SIGTERM; run the same command again"
    assert all(each.startswith(("sft: ", "out: ", "loading ")) for each in begun), done.stderr
    assert done.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["sft out=out", "sft --check", "sft --cfg job", "ls", "env"])
@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_to_each_command(number: signal.Signals, words: str, tmp_path: Path) -> None:
    module = {"ls": "rlhf_cli.commands.ls", "env": "torch"}.get(words, "rlhf_cli.commands.stage")
    code = WHILE_IMPORTING.format(module=module, number=int(number))
    done = python(code, *words.split(), cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    assert f"interrupted by {number.name}" in done.stderr


def test_nothing_is_imported_before_signals_are_taken() -> None:
    """But what the interpreter or the script itself has loaded, and a few small modules."""
    code = (
        "import re, sys; before = set(sys.modules); import rlhf_cli.cli\n"
        "print(*sorted(set(sys.modules) - before - {'atexit', 'select', 'signal', '__future__'}))"
    )
    ours = ["rlhf_cli", "rlhf_cli.cli", "rlhf_cli.commands", "rlhf_cli.config"]
    ours += ["rlhf_cli.config.errors", "rlhf_cli.runs", "rlhf_cli.runs.interrupts"]
    assert python(code, cwd=Path(__file__).parents[2]).stdout.split() == ours


def test_what_swallows_exceptions_swallows_no_signal(tmp_path: Path) -> None:
    body = f"try:\n    {TERM}\nexcept BaseException:\n    pass"
    assert ppo(body, cwd=tmp_path).returncode == 75
    body = f"class Dies:\n    def __del__(self): {TERM}\nDies()"
    assert ppo(body, cwd=tmp_path).returncode == 75


def test_a_signal_before_the_first_step_leaves_no_lock(tmp_path: Path) -> None:
    body = "from rlhf_cli.runs.lock import lock\nPath('out').mkdir()\nlock(Path('out'))\n"
    assert ppo(body + TERM, cwd=tmp_path).returncode == 75
    assert list((tmp_path / "out").iterdir()) == []


def test_signals_while_the_interpreter_ends_change_no_status(tmp_path: Path) -> None:
    """A second one, which is sent as modules are taken down, when Python handles none any more."""
    last = "class Last:\n    kill, pid = staticmethod(os.kill), os.getpid()\n"
    last += "    def __del__(self):\n"
    last += "".join(f"        self.kill(self.pid, {int(number)})\n" for number in SIGNALS)
    last += "sys.last = Last()\n"
    assert ppo(last + "raise Interrupted('saved')", cwd=tmp_path).returncode == 75
    done = ppo(last, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/demo/ppo\n")


def test_a_signal_that_comes_too_late_for_a_job_ends_the_sweep(tmp_path: Path) -> None:
    done = ppo(f"interrupts.wait_for_steps()\n{TERM}", "-m", "seed=1,2", cwd=tmp_path)
    assert done.returncode == 75
    assert "SIGTERM: runs/demo/ppo/seed=1 is finished; the same command goes on" in done.stderr
    assert "job 2" not in done.stderr and "seed=2" not in done.stdout


def test_a_job_after_another_ends_at_once_before_its_first_step(tmp_path: Path) -> None:
    body = f"if cfg.seed == 2:\n    {TERM}\n    raise ValueError\ninterrupts.wait_for_steps()"
    done = ppo(body, "-m", "seed=1,2", cwd=tmp_path)
    assert done.returncode == 75 and "run the same command again" in done.stderr


def test_a_users_function_can_end_its_workers(tmp_path: Path) -> None:
    """Forked off, they have the run's handlers; Ctrl-C is for the run, which needs them still."""
    body = "\n".join(
        (
            "import multiprocessing, signal",
            "interrupts.wait_for_steps()",
            "import time",
            "context = multiprocessing.get_context('fork')",
            "ready = context.Event()",
            "def work(): ready.set(); time.sleep(0.5); ready.set(); time.sleep(60)",
            "worker = context.Process(target=work)",
            "worker.start()",
            "ready.wait(30)",
            "ready.clear()",
            "os.kill(worker.pid, signal.SIGINT)",
            "assert ready.wait(30)",
            "worker.terminate()",
            "worker.join(30)",
            "assert worker.exitcode == -signal.SIGTERM, worker.exitcode",
        )
    )
    done = ppo(body, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_stderr_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
    fill = "os.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x' * 512)\n"
    fill += "except BlockingIOError:\n    os.set_blocking(2, True)\n"
    code = STAGE.format(body="".join(f"    {line}\n" for line in (fill + TERM).splitlines()))
    process = subprocess.Popen([sys.executable, "-c", code, "ppo"], stderr=subprocess.PIPE)
    assert process.wait(60) == 75
    assert process.stderr is not None
    process.stderr.close()


def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    """SIGHUP under nohup."""
    code = f"import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{STAGE}"
    hup = f"    os.kill(os.getpid(), {int(signal.SIGHUP)})"
    assert python(code.format(body=hup), "ppo", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("word", ["--help", "ls"])
def test_the_installed_script(word: str, tmp_path: Path) -> None:
    """A burst of signals from when the first of them is handled."""
    script = str(Path(sys.executable).with_name("rlhf-cli"))
    code = (
        "import runpy, sys, rlhf_cli.runs.interrupts as taken, os\n"
        "take = taken.take\n"
        f"def first(): take(); [os.kill(os.getpid(), {int(signal.SIGTERM)}) for _ in range(9)]\n"
        "taken.take = first\n"
        f"sys.argv = {[script, word]!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    assert python(code, cwd=tmp_path).returncode == 75
    assert os.access(script, os.X_OK)
