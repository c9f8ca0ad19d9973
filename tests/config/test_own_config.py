"""`--config FILE`: a whole config or a part of one, under the words of the command."""

from pathlib import Path

import pytest

from rlhf_cli.config import catalog
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.own_config import read_config
from rlhf_cli.config.own_files import dump
from rlhf_cli.config.stages import STAGES
from rlhf_cli.runs.begun import config_as_written
from tests.conftest import Cli

DIRS = catalog.config_dirs()


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_written_composes_to_the_same(stage: str, tmp_path: Path) -> None:
    cfg = compose(stage, ["name=1.10", r'data.step_join="\\n\n"', "seed=3"])
    file = tmp_path / "x.yaml"
    file.write_text(f"# rlhf-cli {stage} seed=3\n" + dump(config_as_written(cfg)))
    assert compose(stage, [], config_file=str(file)) == cfg


def test_what_cfg_prints_composes_to_the_same(cli: Cli, tmp_path: Path) -> None:
    words = ["algo=ppo_ptx", "name=1e5", r"data.step_join=\\n\n", "out=${name}/x"]
    (tmp_path / "my.yaml").write_text(cli("ppo", "--cfg", "job", *words).stdout)
    assert compose("ppo", [], config_file=str(tmp_path / "my.yaml")) == compose("ppo", words)
    again = cli("ppo", "--config", "my.yaml", "--cfg", "job").stdout
    assert again == (tmp_path / "my.yaml").read_text()


def test_words_win_over_the_file_and_the_file_over_options(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("algo: ppo_ptx\nalgo.lr: 1e-5\nalgo.ptx_coef: 9\nname: 1.10\nseed: 5\n")
    cfg = compose("ppo", ["seed=6"], config_file=str(file))
    assert (cfg.algo.lr, cfg.algo.ptx_coef, cfg.out, cfg.seed) == (1e-5, 9, "runs/1.10/ppo", 6)
    cfg = compose("ppo", ["algo=ppo_ptx"], config_file=str(file))  # sets ptx_coef, and no lr
    assert (cfg.algo.lr, cfg.algo.ptx_coef) == (1e-5, 1.0)


def test_an_option_takes_away_what_it_leaves_unused(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("algo: {loss: dpo, label_smoothing: 0.1, lr: 1e-5}\n")
    algo = compose("dpo", ["algo=ipo"], config_file=str(file)).algo
    assert (algo.loss, algo.label_smoothing, algo.lr) == ("ipo", None, 1e-5)


def test_a_runs_order_to_overwrite_is_not_given_again(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("# rlhf-cli sft\noverwrite: true\n")
    assert compose("sft", [], config_file=str(file)).overwrite is False
    file.write_text("overwrite: true\n")
    assert compose("sft", [], config_file=str(file)).overwrite is True


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("algo: {lrr: 1}\n", "my.yaml: unknown key algo.lrr; did you mean algo.lr?"),
        ("algo: {vf_coef: 1}\n", "it belongs to `rlhf-cli ppo`"),
        ("algo: {lr: high}\n", "algo.lr must be a number > 0 or null, got high (in my.yaml)"),
        ("algo: ppoo\n", "unknown algo option ppoo"),
        ("algo: [ppo]\n", "algo must be an option, or a map of keys"),
        ("defaults: [sft]\n", "has no list of defaults"),
        ("# rlhf-cli ppo seed=1\nseed: 1\n", "is a config of `rlhf-cli ppo`, not of sft"),
        ("hydra: {run: {dir: x}}\n", "hydra.run is not for options"),
        ("a: !!python/name:os.system\n", "no YAML tags"),
        ("0.3\n", "must hold KEY: VALUE lines"),
    ],
)
def test_a_slip_in_the_file_is_one_line(text: str, part: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        compose("sft", [], config_file=str(file))
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match="--config: no file nowhere.yaml"):
        read_config("sft", "nowhere.yaml", [], DIRS)


def test_help_and_sweeps_read_the_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("name: 1.10\nalgo.lr: 3e-5\n")
    shown = cli("sft", "--config", "my.yaml", "--help", "all").stdout
    assert " name=1.10 " in shown and " algo.lr=3e-5 " in shown
    done = cli("sft", "-m", "--config", "my.yaml", "seed=1,2", "--check")
    assert "out: runs/1.10/sft/seed=2 (free)" in done.stderr, done.stderr
