"""Option files and words of the command line set keys of ours; nothing that they name is run."""

from pathlib import Path

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.own_files import MOST_NODES, read_own, read_yaml
from tests.conftest import Cli

RUNS = "{_target_: os.mkdir, path: IT_RAN}"
SYMPY = "{_target_: sympy.sympify, a: \"__import__('os').mkdir('IT_RAN')\"}"
LOGS = "{version: 1, handlers: {x: {(): sympy.sympify, a: \"__import__('os').mkdir('IT_RAN')\"}}}"
GLOBAL = "# @package _global_\ndefaults: [/algo/dpo@algo]\n"
BOMB = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
REACHING = {
    "callbacks": f"{GLOBAL}hydra: {{callbacks: {{x: {SYMPY}}}}}",
    "merged": f"{GLOBAL}<<: {{hydra: {{callbacks: {{x: {SYMPY}}}}}}}",
    "merged list": f"{GLOBAL}<<: [{{lr: 1}}, {{hydra: {{callbacks: {{x: {SYMPY}}}}}}}]",
    "quoted": f'{GLOBAL}"hydra": {{"callbacks": {{x: {SYMPY}}}}}',
    "launcher": f"{GLOBAL}hydra: {{launcher: {SYMPY}}}",
    "sweeper": f"{GLOBAL}hydra: {{sweeper: {SYMPY}}}",
    "logging": f"{GLOBAL}hydra: {{job_logging: {LOGS}, hydra_logging: {LOGS}}}",
    "folder": f"{GLOBAL}hydra: {{run: {{dir: IT_RAN}}, output_subdir: x}}",
    "null": f"{GLOBAL}hydra: null",
    "params": f"{GLOBAL}hydra: {{sweeper: {{params: {{+hydra.callbacks.x: '{RUNS}'}}}}}}",
    "package": f"# @package hydra.callbacks\nx: {SYMPY}",
    "package below": f"#@package  _global_.hydra.callbacks\nx: {SYMPY}",
    "moved": "# @package _global_\ndefaults: [/algo/dpo@algo, /algo/other@hydra.callbacks.x]",
    "moved by a name": "defaults: [/algo/other@${data}.callbacks.x]",
    "chosen": "# @package _global_\ndefaults: [/algo/dpo@algo, {override /hydra/launcher: other}]",
    "theirs": "# @package _global_\ndefaults: [/algo/dpo@algo, /hydra/callbacks/other]",
    "tag": "defaults: [dpo]\nbeta: !!python/object/apply:os.mkdir [IT_RAN]",
    "path tag": "defaults: [dpo]\nbeta: !!python/object/apply:pathlib.Path [x]",
    "plain tag": "defaults: [dpo]\nbeta: !!float 0.1",
    "aliases": f"defaults: [dpo]\n{BOMB}",
    "endless": "defaults: [dpo]\nbeta: &a [*a]",
    "large": "defaults: [dpo]\n" + "#" * 2**20,
}


def options(folder: Path, text: str) -> None:
    """mine/algo/mine.yaml of this text, beside one that would run something."""
    (folder / "mine/algo").mkdir(parents=True)
    (folder / "mine/algo/mine.yaml").write_text(text)
    for place in ("algo", "hydra/launcher", "hydra/callbacks"):
        (folder / "mine" / place).mkdir(parents=True, exist_ok=True)
        (folder / "mine" / place / "other.yaml").write_text(SYMPY)


@pytest.mark.parametrize("kind", REACHING)
def test_an_option_file_that_reaches_further_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options(tmp_path, REACHING[kind])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        read_own(Path("mine/algo/mine.yaml"))
    with pytest.raises(UserError, match=r"mine\.yaml"):
        compose("dpo", ["algo=mine"], "mine")


MODES: list[list[str]] = [
    *([], ["--check"], ["--cfg", "job"], ["--cfg", "hydra"], ["--cfg", "all"], ["--help"]),
    *(["--info"], ["-m"], ["-m", "--check"], ["-m", "seed=0,1"], ["--hydra-help"]),
]


@pytest.mark.parametrize("flags", MODES)
@pytest.mark.parametrize("kind", ["callbacks", "tag", "aliases"])
def test_whatever_is_asked(kind: str, flags: list[str], cli: Cli, tmp_path: Path) -> None:
    options(tmp_path, REACHING[kind])
    done = cli("dpo", "--config-dir", "mine", "algo=mine", "out=x", *flags)
    assert done.returncode == 2, done.stderr
    assert "mine/algo/mine.yaml" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("dpo_schema.yaml", ["dpo"]),
        ("hydra/launcher/basic.yaml", ["dpo", "-m", "seed=0,1"]),
        ("hydra/launcher/mine.yaml", ["dpo", "-m", "seed=0,1", "hydra/launcher=mine"]),
        ("hydra/sweeper/basic.yaml", ["dpo", "-m", "seed=0,1"]),
        ("hydra/hydra_logging/mine.yaml", ["dpo", "hydra/hydra_logging=mine"]),
        ("hydra/config.yaml", ["dpo"]),
        ("algo/hydra.yaml", ["dpo", "algo=hydra"]),
    ],
)
def test_files_in_the_place_of_hydras_own(
    file: str, words: list[str], cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "mine" / file
    path.parent.mkdir(parents=True)
    whole = f"# @package _global_\nhydra: {{callbacks: {{x: {SYMPY}}}}}"
    path.write_text(SYMPY if "er/" in file else whole)
    done = cli(*words, "--config-dir", "mine", "--check", "out=x")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "word",
    [
        f"+hydra.callbacks.x={RUNS}",
        f"++hydra.callbacks={{x: {RUNS}}}",
        f"hydra.launcher={RUNS}",
        "hydra.launcher._target_=os.mkdir",
        f"+hydra.launcher.x={RUNS}",
        f"+hydra.sweeper.x=[{RUNS}]",
        "+hydra.sweeper.x=${data.columns}",
        f"+hydra.sweeper.params={{+hydra.callbacks.x: '{RUNS}'}}",
        f"hydra.job_logging={LOGS}",
        "hydra/callbacks=x",
        "hydra/job_logging=default",
        "hydra/launcher@hydra.callbacks.x=basic",
        "hydra/launcher=../../mine",
        "hydra.searchpath=[file://mine]",
        "hydra.mode=MULTIRUN",
        "hydra.run.dir=elsewhere",
        "hydra.output_subdir=elsewhere",
        "+hydra.job.env_set.PATH=x",
        "hydra={callbacks: {}}",
        "algo@hydra.callbacks.x=dpo",
    ],
)
@pytest.mark.parametrize("flags", [["--check"], ["--cfg", "hydra"], ["-m"]])
def test_words_that_reach_further_are_refused(
    word: str, flags: list[str], cli: Cli, tmp_path: Path
) -> None:
    done = cli("sft", word, "out=x", *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_options_may_do(cli: Cli, tmp_path: Path) -> None:
    """Set keys of ours wherever these stand, build on others, and say what is swept over."""
    (tmp_path / "mine/algo").mkdir(parents=True)
    (tmp_path / "mine/data").mkdir()
    (tmp_path / "mine/data/base.yaml").write_text("defaults: [demo, _self_]\neval_rows: 7\n")
    (tmp_path / "mine/algo/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /algo/dpo@algo\n  - override /data: base\n"
        "out: z\nalgo: {batch_size: &n 5, epochs: *n}\n"
        "hydra: {sweeper: {params: {algo.lr: '1e-3,2e-3'}}}\n"
    )
    cfg = compose("dpo", ["algo=mine"], str(tmp_path / "mine"))
    assert (cfg.out, cfg.algo.batch_size, cfg.algo.epochs, cfg.data.eval_rows) == ("z", 5, 5, 7)
    done = cli("dpo", "--config-dir", "mine", "algo=mine", "--cfg", "hydra")
    assert done.returncode == 0, done.stderr
    assert "algo.lr: 1e-3,2e-3" in done.stdout


def test_what_a_sweep_may_be_told(cli: Cli) -> None:
    words = ["hydra/launcher=basic", "hydra.sweep.dir=${out}/x", "hydra.sweeper.max_batch_size=1"]
    done = cli("sft", *words, "--cfg", "hydra")
    assert done.returncode == 0, done.stderr
    assert "dir: ${out}/x" in done.stdout


def test_merge_keys_and_aliases_are_read_as_yaml_means_them(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("<<: [{a: 1, b: 1}, {b: 2, c: 2}]\nc: 3\nd: &d [1]\ne: [*d, *d]\n")
    assert read_yaml(file) == {"a": "1", "b": "1", "c": "3", "d": ["1"], "e": [["1"], ["1"]]}
    file.write_text(f"x: [{', '.join('1' * MOST_NODES)}]\n")
    with pytest.raises(UserError, match="more than"):
        read_yaml(file)


def test_an_option_that_builds_on_itself_ends_in_a_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine/algo").mkdir(parents=True)
    (tmp_path / "mine/algo/mine.yaml").write_text("defaults: [mine]\nlr: 1\n")
    for flags in (["--check"], ["--help"]):
        done = cli("sft", "--config-dir", "mine", "algo=mine", *flags)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1 and "mine" in done.stderr
