"""The console script, in a subprocess: help, ls, cp, env, completion, --check, sweeps, statuses."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli.commands import cp
from rlhf_cli.commands.flags import parse
from rlhf_cli.commands.help import CHANGED, stage_help
from rlhf_cli.commands.ls import _options
from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.stages import STAGES
from tests.conftest import Cli

# --------------------------------------------------------------------------- help


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_overview_names_every_stage(words: tuple[str, ...], cli: Cli) -> None:
    done = cli(*words)
    assert done.returncode == 0
    assert done.stderr == ""
    for stage in STAGES:
        assert f"\n  {stage} " in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_stage_help_shows_every_key_with_value_and_meaning(stage: str, cli: Cli) -> None:
    done = cli(stage, "--help", "all", COLUMNS="120")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 120
    flat = " ".join(done.stdout.split())
    for key, field in catalog.keys(stage).items():
        assert f" {key}=" in flat
        takes = catalog.describe(stage, key)
        assert takes in flat or all(name in flat for name in catalog.choices(stage, key))
        assert field.metadata["meaning"].split()[0] in flat


def test_stage_help_follows_options_and_values(cli: Cli) -> None:
    text = cli("ppo", "algo=ppo_adaptive", "algo.lam=0.9", "--help", "all").stdout
    assert "algo.kl_controller=ziegler" in text
    assert "algo.lam=0.9" in text


def test_stage_help_is_readable_in_a_narrow_terminal(cli: Cli) -> None:
    text = cli("ppo", "--help", "all", COLUMNS="50").stdout
    assert "Weight of the entropy bonus." in text


@pytest.mark.parametrize("stage", STAGES)
def test_the_short_help_shows_what_people_change(stage: str) -> None:
    lines = stage_help(stage, ["seed=7"], catalog.config_dirs()).splitlines()
    assert len(lines) <= 68 and "  seed=7" in "\n".join(lines)
    shown = [line.split("=")[0].strip() for line in lines if "=" in line]
    assert set(shown) & set(catalog.keys(stage)) >= {"name", "out", "seed", "data.path"}
    assert lines[-1].endswith(f"more keys, and all of each: rlhf-cli {stage} --help all")


def test_what_people_change_are_keys() -> None:
    known = {key for stage in STAGES for key in catalog.keys(stage)}
    assert set(CHANGED) <= known and len(set(CHANGED)) == len(CHANGED)


def test_help_on_a_key_or_a_group() -> None:
    def about(word: str) -> str:
        return stage_help("ppo", ["algo.kl_coef=0.7"], catalog.config_dirs(), about=word)

    told = about("algo.kl_coef")
    assert told.startswith("  algo.kl_coef=0.7  number >= 0  ") and "algo=ppo_ptx " in told
    assert about("kl_coef") == told
    group = about("hardware").splitlines()
    assert sum(line.startswith("  hardware.") for line in group) == len(
        catalog.group_keys("ppo", "hardware")
    )
    with pytest.raises(UserError, match="ppo has no key klcoef; did you mean kl_coef"):
        about("klcoef")


def test_an_override_may_stand_behind_help() -> None:
    flags = parse("ppo", ["--help", "algo=ppo_ptx", "seed=1"])
    assert (flags.help, sorted(flags.overrides)) == ("", ["algo=ppo_ptx", "seed=1"])
    assert parse("ppo", ["seed=1", "-h", "algo.lr"]).help == "algo.lr"
    assert parse("ppo", ["seed=1"]).help is None


def test_help_in_a_pipe_is_as_wide_as_the_environment_says(cli: Cli) -> None:
    narrow, wide = (
        max(map(len, cli("sft", "--help", COLUMNS=columns).stdout.splitlines()))
        for columns in ("60", "120")
    )
    assert narrow <= 60 < wide <= 120


@pytest.mark.parametrize(
    "words",
    [
        *("ls", "ls runs", "cp", "env", "completion", "compare", "data", "export"),
        *("watch", "rounds", "report", "chat"),
    ],
)
def test_every_command_has_help(words: str, cli: Cli) -> None:
    done = cli(*words.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"rlhf-cli {words.split()[0]}" in done.stdout


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], ["torch", "hydra", "omegaconf"]),
        (["ppo", "--help"], ["torch", "hydra", "omegaconf"]),
        (["ls", "algo"], ["torch", "hydra", "omegaconf"]),
        (["ppo", "--cfg", "job"], ["torch", "transformers"]),
        (["ppo", "--check", "algo.kl_coef=abc"], ["torch", "transformers"]),
        (["ppo", "--check"], ["torch", "transformers"]),
        (["sft", "--check"], ["torch", "transformers", "pyarrow", "pandas"]),
    ],
)
def test_what_must_be_quick_imports_nothing_heavy(
    words: list[str], absent: list[str], tmp_path: Path
) -> None:
    code = (
        "import sys; sys.argv[0] = 'rlhf-cli'\n"
        "from rlhf_cli.cli import main\n"
        "main(); print('MODULES', *sys.modules)"
    )
    done = python(code, words, tmp_path)
    modules = done.stdout.rpartition("MODULES")[2].split()
    assert "rlhf_cli.cli" in modules
    assert not [name for name in absent if name in modules]


@pytest.mark.slow
def test_stages_import_nothing_that_their_runs_do_not_need(tmp_path: Path) -> None:
    """peft is for adapters, datasets for rows of the hub, and pyarrow's own ways import pandas."""
    code = (
        "import sys; from rlhf_cli.cli import main\n"
        "for stage in ('sft', 'dpo'):\n"
        "    sys.argv = ['rlhf-cli', stage, 'algo.max_steps=1', 'hardware.threads=1']\n"
        "    assert main() == 0\n"
        "print('MODULES', *sys.modules)"
    )
    done = python(code, [], tmp_path)
    modules = done.stdout.rpartition("MODULES")[2].split()
    assert "transformers.modeling_utils" in modules and "pyarrow" in modules, done.stderr
    assert not {"peft", "datasets", "pandas", "torch.utils.tensorboard"} & set(modules)


def python(
    code: str, words: list[str], cwd: Path, **env: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("words", ["ppo --help", "ls runs", "ls runs --json"])
def test_a_reader_that_leaves_is_no_error(words: str, tmp_path: Path) -> None:
    """It ends as `cat` and others do that SIGPIPE ends, with nothing said."""
    for number in range(500 if "runs" in words else 0):  # more than a pipe holds
        folder = tmp_path / "runs" / f"{number}{200 * 'x'}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("# rlhf-cli sft\n")
    script = Path(sys.executable).parent / "rlhf-cli"
    line = f"'{script}' {words} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
    # what a pipe holds may be written before its reader is gone
    assert done.returncode == 141 or (done.returncode == 0 and "runs" not in words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ls >&-", "standard output is closed"),
        ("ls >/dev/full", "No space left on device"),
        ("--help >/dev/full", "No space left on device"),
    ],
)
def test_what_cannot_be_shown_is_one_line(words: str, message: str, tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "rlhf-cli"
    done = subprocess.run(
        f"'{script}' {words}", shell=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("rlhf-cli: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


# --------------------------------------------------------------------------- ls, cp, env


def test_ls(cli: Cli) -> None:
    assert cli("ls").stdout.split()[0] == "algo"
    lines = cli("ls", "algo", COLUMNS="140").stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["dpo"] == ["dpo"]
    assert rows["ppo_ptx"][:4] == ["ppo", "ppo", "with", "ptx_coef=1.0"]
    assert "all stages" in cli("ls", "hardware").stdout
    lines = cli("ls", "data", COLUMNS="140").stdout.splitlines()
    assert all(len(re.split(" {2,}", line.strip())) == 3 for line in lines)  # each has its line
    assert any(
        line.startswith("  jsonl ") and line.endswith("the old name of rows") for line in lines
    )
    assert cli("ls", "recipes").returncode == 0


def test_cp_copies_an_option_and_never_overwrites(cli: Cli, tmp_path: Path) -> None:
    done = cli("cp", "algo/ppo_ptx", "mine/algo/")
    copy = tmp_path / "mine" / "algo" / "ppo_ptx.yaml"
    assert done.stdout == "mine/algo/ppo_ptx.yaml\n"
    assert copy.read_text() == (catalog.shipped("conf") / "algo" / "ppo_ptx.yaml").read_text()
    again = cli("cp", "algo/ppo_ptx.yaml", "mine/algo")
    assert again.returncode == 2
    assert "does not overwrite" in again.stderr
    assert cli("cp", "algo/ppo", "mine/algo/other.yaml").returncode == 0
    assert cli("ppo", "--config-dir", "mine", "algo=other", "--cfg", "job").returncode == 0


def test_cp_copies_every_recipe_and_what_it_reads(cli: Cli, tmp_path: Path) -> None:
    for recipe in catalog.shipped("recipes").glob("*.*"):
        assert cli("cp", recipe.name, ".").stdout == f"{recipe.name}\n"
        assert os.access(tmp_path / recipe.name, os.X_OK) == os.access(recipe, os.X_OK)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (f"{group}/{option}" if option == "kto" else option, f"{group}/{option}.yaml")
        for group in catalog.GROUPS
        for option in _options(group)
    ]
    + [("algo/ppo", "algo/ppo.yaml"), ("ppo.yaml", "algo/ppo.yaml"), ("hh_ppo", "hh_ppo.sh")],
)
def test_cp_copies_whatever_ls_prints(name: str, file: str, tmp_path: Path) -> None:
    cp.run([name, f"{tmp_path}/"])
    shelf = catalog.shipped("conf" if "/" in file else "recipes")
    assert (tmp_path / Path(file).name).read_bytes() == (shelf / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ppp", "nothing is named ppp; did you mean ppo?"),
        ("kto", "kto names more than one file: take algo/kto.yaml or data/kto.yaml"),
        ("algo", "algo is a list; name one of what `rlhf-cli ls algo` shows"),
        ("mine", "--config mine/config.yaml"),
    ],
)
def test_cp_says_what_it_cannot_copy(name: str, part: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("seed: 1\n")
    done = cli("cp", name, "there")
    assert done.returncode == 2 and part in done.stderr
    assert not (tmp_path / "there").exists()


@pytest.mark.slow
def test_env(cli: Cli) -> None:
    text = cli("env").stdout
    for name in ("python", "torch", "transformers", "hydra-core", "device", "threads"):
        assert f"  {name} " in text


# --------------------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("line", "present", "absent"),
    [
        ("rlhf-cli ", ["sft ", "ppo ", "ls "], []),
        ("rlhf-cli p", ["ppo "], ["sft "]),
        ("rlhf-cli ppo ", ["algo=", "algo.kl_coef=", "policy="], ["algo.beta="]),
        ("rlhf-cli ppo alg", ["algo=", "algo.kl_coef="], ["policy="]),
        ("rlhf-cli ppo algo=", ["algo=ppo ", "algo=ppo_ptx "], ["algo=dpo "]),
        ("rlhf-cli ppo seed=3 algo.kl_con", ["algo.kl_controller="], ["algo.kl_coef="]),
        ("rlhf-cli ppo algo.kl_controller=", ["algo.kl_controller=fixed "], []),
        ("rlhf-cli ppo overwrite=t", ["overwrite=true "], ["overwrite=false "]),
        ("rlhf-cli ppo --ch", ["--check "], ["--cfg "]),
        ("rlhf-cli ls ", ["algo ", "recipes "], []),
        ("rlhf-cli cp algo/ppo_", ["algo/ppo_ptx "], ["algo/dpo "]),
        ("rlhf-cli completion ", ["bash ", "zsh ", "fish "], []),
        ("rlhf-cli export a b ", ["save_dtype=", "gguf=", "push="], ["algo="]),
        ("rlhf-cli merge a b save_dtype=", ["save_dtype=float16 ", "save_dtype=source "], []),
        ("rlhf-cli nothing ", [], ["ppo "]),
    ],
)
def test_completion(line: str, present: list[str], absent: list[str], cli: Cli) -> None:
    done = cli("completion", "query", COMP_LINE=line, COMP_POINT=str(len(line)))
    found = done.stdout.split("\n")
    assert done.returncode == 0
    assert set(present) <= set(found)
    assert not set(absent) & set(found)


def test_completion_stops_at_the_cursor(cli: Cli) -> None:
    done = cli("completion", "query", COMP_LINE="rlhf-cli pp algo=x", COMP_POINT="11")
    assert done.stdout == "ppo \n"


def test_completion_knows_own_options(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine" / "algo").mkdir(parents=True)
    (tmp_path / "mine" / "algo" / "gentle.yaml").write_text("defaults: [ppo, _self_]\n")
    line = "rlhf-cli ppo --config-dir mine algo=g"
    done = cli("completion", "query", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.stdout == "algo=gentle \n"


@pytest.mark.parametrize(
    ("line", "words", "expected"),
    [
        ("rlhf-cli pp", "rlhf-cli pp", ["ppo "]),
        # bash cuts words at "=", so only what follows it is given back
        ("rlhf-cli ppo algo=ppo_p", "rlhf-cli ppo algo = ppo_p", ["ppo_ptx "]),
    ],
)
def test_bash_completes(line: str, words: str, expected: list[str], cli: Cli) -> None:
    script = cli("completion", "bash").stdout
    bin_folder = Path(sys.executable).parent
    program = (
        f'{script}\nCOMP_WORDS=({words}); COMP_LINE="{line}"; COMP_POINT={len(line)}\n'
        '_rlhf_cli; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program],
        env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == expected


# --------------------------------------------------------------------------- composing


def test_cfg_job_prints_the_config(cli: Cli) -> None:
    done = cli("ppo", "algo=ppo_ptx", "algo.kl_coef=0.3", "--cfg", "job")
    assert done.returncode == 0
    assert "kl_coef: 0.3" in done.stdout
    assert "policy: runs/${name}/sft" in done.stdout
    resolved = cli("ppo", "--cfg", "job", "--resolve").stdout
    assert "policy: runs/demo/sft" in resolved
    part = cli("ppo", "--cfg", "job", "-p", "algo").stdout
    assert "kl_coef" in part
    assert "policy" not in part


def test_own_options_from_outside_the_checkout(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine" / "algo").mkdir(parents=True)
    (tmp_path / "mine" / "algo" / "gentle.yaml").write_text(
        "defaults: [ppo, _self_]\nkl_coef: 0.7\n"
    )
    done = cli("ppo", "--config-dir", "mine", "algo=gentle", "--cfg", "job", "-p", "algo")
    assert "kl_coef: 0.7" in done.stdout


# --------------------------------------------------------------------------- running
# A stand-in for the stage: what is tested is what the command line makes of its end.

STAND_IN = """
import sys, types
from pathlib import Path
from rlhf_cli.config.errors import RunError, UserError

def run(cfg, plan):
{body}

def preflight(cfg, check_only):
    if cfg.seed == 13:
        raise UserError("seed 13 is unlucky")
    lines = [f"would write {{cfg.out}}"]
    return types.SimpleNamespace(state="free", lines=lambda: lines, at_once=lambda: [])

for name, function in {{"stages.ppo": run, "runs.preflight": preflight}}.items():
    module = types.ModuleType(f"rlhf_cli.{{name}}")
    setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
sys.argv[0] = "rlhf-cli"
from rlhf_cli.cli import main
sys.exit(main())
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def stand_in(tmp_path: Path) -> Run:
    """Run `rlhf-cli WORDS...` with a stage whose body is given."""

    def run(body: str, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        code = STAND_IN.format(body=f"    {body}")
        return python(code, ["ppo", *words], tmp_path, **env)

    return run


def test_stdout_is_the_path_alone(stand_in: Run, tmp_path: Path) -> None:
    done = stand_in("print('log', file=sys.stderr); return Path(cfg.out)", "name=mine")
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/mine/ppo\n", "log\n")
    assert list(tmp_path.iterdir()) == []


def test_check_prints_the_summary_and_runs_nothing(stand_in: Run, tmp_path: Path) -> None:
    done = stand_in("raise RunError('it ran')", "--check", "out=x")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "would write x\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("raise UserError('bad row')", 2, "rlhf-cli: error: bad row\n"),
        ("raise RunError('loss is\\nnot finite')", 1, "rlhf-cli: error: loss is not finite\n"),
        (
            "raise KeyboardInterrupt",
            130,
            "rlhf-cli: error: interrupted; the same command resumes\n",
        ),
        ("{}['x']", 1, "KeyError: 'x' (set RLHF_TRACEBACK=1 for the traceback)\n"),
        ("raise MemoryError('of 9 bytes')", 1, "for the traceback; --check tells what fits)\n"),
    ],
)
def test_how_a_run_ends(body: str, status: int, message: str, stand_in: Run) -> None:
    done = stand_in(body)
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.endswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("body", ["raise UserError('bad row')", "{}['x']"])
def test_a_traceback_on_request(body: str, stand_in: Run) -> None:
    done = stand_in(body, RLHF_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_sweep_gives_each_job_its_folder(stand_in: Run, tmp_path: Path) -> None:
    body = "Path(cfg.out).mkdir(parents=True); return Path(cfg.out)"
    done = stand_in(body, "-m", "algo.kl_coef=0.1,0.2", "algo=ppo,ppo_ptx")
    assert done.returncode == 0, done.stderr
    jobs = ("0.1_algo=ppo", "0.1_algo=ppo_ptx", "0.2_algo=ppo", "0.2_algo=ppo_ptx")
    assert done.stdout.splitlines() == [f"runs/demo/ppo/kl_coef={job}" for job in jobs]
    assert (tmp_path / "runs/demo/ppo/multirun.yaml").is_file()
    assert done.stderr.splitlines()[:2] == [
        "sweep: 4 jobs in runs/demo/ppo; then rlhf-cli compare runs/demo/ppo",
        f"job 1 of 4: runs/demo/ppo/kl_coef={jobs[0]}",
    ]
    assert "HYDRA" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_a_check_as_json(cli: Cli) -> None:
    done = cli("sft", "--check", "--json", "seed=4")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {key: found[key] for key in ("stage", "out", "state", "parameters")} == {
        "stage": "sft",
        "out": "runs/demo/sft",
        "state": "free",
        "parameters": None,  # it is built from scratch
    }
    assert found["peak_bytes"] > 2**20
    assert found["memory"][-1].startswith("predicted peak memory: ")
    jobs = json.loads(cli("sft", "--check", "--json", "-m", "seed=1,2").stdout)
    assert [(job["job"], job["swept"], job["out"]) for job in jobs] == [
        (0, "seed=1", "runs/demo/sft/seed=1"),
        (1, "seed=2", "runs/demo/sft/seed=2"),
    ]
    wrong = cli("sft", "--check", "--json", "algo.epochs=0")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "algo.epochs" in wrong.stderr


def test_a_sweep_can_be_checked(stand_in: Run, tmp_path: Path) -> None:
    done = stand_in("raise RunError('it ran')", "-m", "--check", "algo.kl_coef=0.1,0.2")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "would write runs/demo/ppo/kl_coef=0.2" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_with_a_bad_job_starts_none(stand_in: Run, tmp_path: Path) -> None:
    done = stand_in("return Path(cfg.out)", "-m", "seed=1,13")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "rlhf-cli: error: seed 13 is unlucky\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "status"), [("UserError", 2), ("RunError", 1), ("KeyError", 1)])
def test_a_failed_job_fails_the_sweep(error: str, status: int, stand_in: Run) -> None:
    body = f"if cfg.seed == 1: raise {error}('lost')\n    return Path(cfg.out)"
    done = stand_in(body, "-m", "seed=1,2")
    assert done.returncode == status
    assert done.stdout == "runs/demo/ppo/seed=2\n"
    assert "lost" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- threads

WAITS = """
import ctypes, importlib.util
from pathlib import Path
from rlhf_cli.cli import let_threads_sleep
let_threads_sleep()
folder = Path(importlib.util.find_spec("torch").origin).parent  # whose import takes seconds
for file in {*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")}:
    ctypes.CDLL(str(file))
"""


@pytest.mark.parametrize(("given", "turns"), [({}, "2000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")])
def test_threads_that_wait_sleep_soon_unless_the_user_set_how(
    given: dict[str, str], turns: str
) -> None:
    """What PyTorch's own OpenMP takes from the environment that the command line leaves."""
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    rest = {name: value for name, value in os.environ.items() if name not in own}
    command = [sys.executable, "-c", WAITS]
    shown = subprocess.run(
        command,
        env={**rest, **given, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("this PyTorch has another OpenMP")
    assert f"GOMP_SPINCOUNT = '{turns}'" in shown
