"""Where the jobs of a sweep write: folders name what was swept, and nothing twice."""

import os
from pathlib import Path

import pytest

from rlhf_cli.commands import sweeps
from rlhf_cli.config.compose import hydras_words, typed_config
from rlhf_cli.config.errors import UserError
from tests.conftest import Cli


def places(*words: str, stage: str = "sft") -> list[str]:
    """The folders of a sweep's jobs."""
    jobs = sweeps.jobs(hydras_words(stage, list(words), sweep=True))
    outs = [typed_config(stage, job).out for job in jobs]
    unnamed = sweeps.unnamed_keys(jobs, outs)
    return [sweeps.place(out, job, unnamed) for out, job in zip(outs, jobs, strict=True)]


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        (["name=1.10,1.2"], ["runs/1.10/sft", "runs/1.2/sft"]),
        (["name=a", "seed=0,1"], ["runs/a/sft/seed=0", "runs/a/sft/seed=1"]),
        (["name=a,b", "seed=3"], ["runs/a/sft", "runs/b/sft"]),
        (
            ["name=a,b", "seed=0,1"],
            [f"runs/{name}/sft/seed={seed}" for name in "ab" for seed in "01"],
        ),
        (
            ["out=x", "algo.lr=1e-3", "algo.text_mix=null,0.5", "model=tiny,pretrained"],
            [
                f"x/text_mix={mix}_model={m}"
                for mix in ("null", 0.5)
                for m in ("tiny", "pretrained")
            ],
        ),
        (["out=x,y"], ["x", "y"]),
        (["out=x/${algo.lr}", "algo.lr=1e-3,2e-3"], ["x/0.001", "x/0.002"]),
        (["out=x", "seed=4"], ["x"]),
    ],
)
def test_folders_name_what_was_swept(words: list[str], folders: list[str]) -> None:
    assert places(*words) == folders


def test_no_job_writes_into_the_folder_of_another() -> None:
    first, second = places("out=x,x/y")
    assert first == "x/out=x" and second.startswith("x/y/out=x-y-")


def test_one_more_value_moves_no_folder() -> None:
    fewer, more = places("out=x", "seed=1,2"), places("out=x", "seed=0,1,2")
    assert set(fewer) < set(more)


def test_odd_values_become_plain_names_that_differ() -> None:
    folders = places("out=x", 'data.step_join="a/b","a b","-","$(ls)"')
    assert len(set(folders)) == 4
    assert all(sweeps.ODD.search(Path(each).name.replace("=", "")) is None for each in folders)
    long = places("out=x", f"data.step_join={'a' * 300},{'b' + 'a' * 300}")
    assert len(set(long)) == 2 and max(map(len, long)) < 100


def test_the_same_job_twice_is_refused() -> None:
    with pytest.raises(UserError, match="two jobs of the sweep would write runs/demo/sft"):
        places("seed=1,1")


def test_multirun_lies_around_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweeps.home(["x/seed=1", "x/seed=2"]) == "x"
    assert sweeps.home(["runs/a/sft", "runs/b/sft"]) == "runs"
    assert sweeps.home(["a", "b"]) == os.curdir
    assert sweeps.home(["/one/a", "/two/b"]) == "/one"


def test_option_files_may_sweep_over_texts(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo/mine.yaml").write_text(
        "# @package _global_\ndefaults: [/algo/sft@algo]\n"
        "hydra: {sweeper: {params: {name: '1.10,1.2'}}}\n"
    )
    done = cli("sft", "-m", "--check", "--config-dir", ".", "algo=mine", "seed=1,2")
    found = [line for line in done.stderr.splitlines() if line.startswith("out:")]
    assert found == [
        f"out: runs/{name}/sft/seed={seed} (free)" for name in ("1.10", "1.2") for seed in (1, 2)
    ], done.stderr
