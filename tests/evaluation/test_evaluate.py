"""The stage: what its figures depend on, and what stands in its report."""

import contextlib
import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.evaluation.bench import best_places
from rlhf_cli.rollout.native import NativeEngine
from tests.ranks import on_ranks
from tests.tiny import DATA
from tests.training.test_stages_on_ranks import near

pytestmark = pytest.mark.usefixtures("inside")
JUDGES = ["reference=runs/demo/sft", "reward=length:4", "gold=regex:a"]
FEW = [*JUDGES, "algo.prompts=5"]


def evaluated(out: Path, *more: str) -> dict[str, Any]:
    sampled = not any(word.startswith("samples=") for word in more)
    few = [*FEW, "algo.samples=2"] if sampled else JUDGES
    words = [*DATA, "policy=runs/demo/sft", *few, f"out={out}", *more]
    made: Path = importlib.import_module("rlhf_cli.stages.evaluate").run(compose("evaluate", words))
    found: dict[str, Any] = json.loads((made / "report.json").read_text())
    return found


def test_figures_of_a_policy_do_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    alone = evaluated(tmp_path / "alone", "baselines=[]")
    last = evaluated(
        tmp_path / "last", "policy=runs/demo/adapter", "baselines=[runs/demo/sft]", "anchor=null"
    )
    assert alone["policies"]["runs/demo/sft"] == last["policies"]["runs/demo/sft"]
    assert alone["ratings"].keys() == {"runs/demo/sft", "references"}


def test_all_that_is_compared(tmp_path: Path) -> None:
    copies = [tmp_path / f"sweep/{i}/sft" for i in range(2)]
    for copy in copies:
        shutil.copytree("runs/demo/adapter", copy)
    words = [f"baselines=[runs/demo/adapter,{tmp_path}/sweep/*/sft]", "algo.temperatures=[0,0.5]"]
    report = evaluated(tmp_path / "out", *words, f"anchor={copies[1]}")
    others = ["runs/demo/adapter", *map(str, copies)]
    assert list(report["policies"]) == ["runs/demo/sft", *others]
    assert list(report["win_rates"]) == others
    assert list(report["against_references"]) == ["runs/demo/sft", *others]
    assert report["anchor"] == str(copies[1]) and report["ratings"][str(copies[1])]["rating"] == 0
    assert report["by_temperature"].keys() == {"0", "0.5", "1"}
    assert report["by_temperature"]["1"]["win_rates"] == report["win_rates"]
    assert report["references"]["gold"]["mean"] >= 0
    own = report["policies"]["runs/demo/sft"]
    assert own["gold_pass_at"]["1"]["mean"] == pytest.approx(own["gold"]["mean"])
    assert own["best_of"]["1"]["reward"]["mean"] == pytest.approx(own["reward"]["mean"])
    assert {point["from"] for point in report["frontier"]} == {"policy", "best of n"}
    assert (tmp_path / "out/frontier.png").is_file() and (tmp_path / "out/win_rates.png").is_file()
    lines = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 5 * (1 + 2 + 2)
    at = {(line["policy"], line["temperature"]) for line in lines}
    assert len(at) == 12 and all("row_chosen" in line for line in lines)


def test_a_row_says_nothing_in_the_name_of_a_judge(tmp_path: Path) -> None:
    own = {"policy": "insured", "temperature": "mild", "gold": 5, "kl": 7, "scores": [1]}
    rows = [{"prompt": f"Greet {i}: ", "completion": "Hi", **own} for i in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [f"data.path={file}", f"data.eval_path={file}", "baselines=[]"]
    evaluated(tmp_path / "out", *source)
    for line in map(json.loads, (tmp_path / "out/samples.jsonl").read_text().splitlines()):
        assert {name: line[f"row_{name}"] for name in own} == own
        assert line["policy"] == "runs/demo/sft" and line["kl"] != 7 and line["gold"] in (0, 1)
        assert "scores" not in line and line["temperature"] == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["anchor=runs/demo/other"], "anchor=runs/demo/other is none of the policies"),
        (["baselines=[nothing/*/sft]"], r"nothing/\*/sft does not exist"),
        (["algo.temperatures=[0.5,-1]"], "algo.temperatures must be"),
        (["algo.beams=2", "algo.temperatures=[0.5]"], "algo.temperatures is for sampling"),
    ],
)
def test_what_is_refused_before_anything_is_sampled(
    words: list[str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line):
        evaluated(tmp_path, *words)


@pytest.mark.slow
def test_samples_of_a_file_are_judged_as_those_of_the_policies_were(tmp_path: Path) -> None:
    made = evaluated(tmp_path / "made", "baselines=[runs/demo/adapter]")
    words = [f"samples={tmp_path}/made/samples.jsonl", "baselines=[]"]
    report = evaluated(tmp_path / "again", *words)
    for name, figures in made["policies"].items():
        again = report["policies"][name]
        for each in ("reward", "gold", "best_of", "text", "gold_pass_at", "gain_over_reference"):
            assert again[each] == figures[each], each
        assert "kl" not in again
    for each in ("win_rates", "against_references", "ratings", "references"):
        assert report[each] == made[each], each
    assert report["samples"] == 2  # as the file has them, not as the config would sample
    assert report["temperature"] == made["temperature"] == 1.0
    with pytest.raises(UserError, match="choices=x asks a policy, but samples="):
        evaluated(tmp_path / "no", *words, "choices=x")


def test_a_file_may_name_whom_it_likes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`policy` gives the tokenizer alone: the first that the file names meets the other."""
    lines = [
        {"policy": name, "prompt": f"Greet {i}", "response": "ab"[: end + 1], "gold": 9}
        for end, name in enumerate(("gpt", "runs/demo/sft"))
        for i in range(3)
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = evaluated(tmp_path / "out", f"samples={file}", "baselines=[]")
    assert list(report["policies"]) == ["gpt", "runs/demo/sft"]
    assert list(report["win_rates"]) == ["runs/demo/sft"]
    said = capsys.readouterr().err
    assert (report["samples"], report["temperature"]) == (1, None)  # which nobody has said
    assert "gpt wins" in said and "sft wins" not in said and "gold of gpt is 1.00" in said


def test_a_policy_that_is_shown_demonstrations(tmp_path: Path) -> None:
    words = ["baselines=[]", "prompted=runs/demo/adapter", "algo.prompts=3"]
    report = evaluated(tmp_path / "out", *words, "few_shot=1", "data.max_response_tokens=7")
    name = "runs/demo/adapter 1-shot"
    assert list(report["policies"]) == ["runs/demo/sft", name]
    assert list(report["win_rates"]) == [name]
    assert "kl" not in report["policies"][name] and "text_loss" not in report["policies"][name]
    lines = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    theirs = [each for each in lines if each["policy"] == name]
    assert len(theirs) == 6 and all(each["prompt"].startswith("Greet") for each in theirs)
    assert not any("\n\n" in each["response"] for each in theirs)
    with pytest.raises(UserError, match="prompted=runs/demo/adapter needs few_shot=VALUE"):
        evaluated(tmp_path / "no", *words)
    with pytest.raises(UserError, match="few_shot is not used by prompted=null"):
        evaluated(tmp_path / "no", "few_shot=2")


def test_the_best_of_n_is_a_policy_of_its_own(tmp_path: Path) -> None:
    words = ["baselines=[]", "best_of=runs/demo/sft", "algo.prompts=3", "reward=length:4"]
    report = evaluated(tmp_path / "out", *words, "best_of_n=8")
    name = "runs/demo/sft best of 8"
    assert list(report["policies"]) == ["runs/demo/sft", name]
    assert list(report["win_rates"]) == [name] and name in report["ratings"]
    plain, best = report["policies"].values()
    assert best["reward"]["mean"] > plain["reward"]["mean"]
    assert best["kl_bound"] == pytest.approx({"mean": math.log(8) - 7 / 8, "stderr": 0}, abs=1e-5)
    assert not best.keys() & {"kl", "entropy", "text_loss"}
    assert report["frontier"][-1]["kl"] == best["kl_bound"]
    lines = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines if line["policy"] == name] == [0, 1] * 3
    for wrong, line in {
        "best_of_n=null": "best_of=runs/demo/sft needs best_of_n=VALUE",
        "reward=null": "best_of=runs/demo/sft is chosen by reward=",
        "algo.temperature=0": "best_of=runs/demo/sft is for sampling",
    }.items():
        with pytest.raises(UserError, match=line):
            evaluated(tmp_path / "no", *words, "best_of_n=8", wrong)


def test_any_number_of_scorers(tmp_path: Path) -> None:
    words = ["baselines=[runs/demo/adapter]", "algo.prompts=3"]
    plain = evaluated(tmp_path / "plain", *words)
    report = evaluated(tmp_path / "out", *words, "scorers=['regex:a','length:6']")
    assert (
        report["scorers"] == ["regex:a", "length:6"] and report["win_rates"] == plain["win_rates"]
    )
    for name, figures in report["policies"].items():
        assert figures["scores/regex:a"] == figures["gold"]
        assert figures["scores/regex:a_pass_at"] == figures["gold_pass_at"]
        assert figures["scores/regex:a_gain"] == figures["gain_over_reference"]
        assert figures["reward_gain"]["mean"] == pytest.approx(
            figures["reward"]["mean"] - report["policies"]["runs/demo/sft"]["reward"]["mean"],
            abs=1e-5,
        )
        before = plain["policies"][name]
        assert {each: figures[each] for each in before} == before
    for line in (tmp_path / "out/samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["scores"].keys() == {"regex:a", "length:6"}
        assert row["scores"]["regex:a"] == row["gold"]
    words = ["reward=null", "gold=null", "scorers=['length:6']", f"out={tmp_path}/no"]
    with pytest.raises(UserError, match=r"evaluate needs reward=\.\.\. or gold="):
        evaluated(tmp_path / "no", *words)


def test_the_optimum_on_a_space_that_is_enumerated(tmp_path: Path) -> None:
    """One token of 280: all responses are known."""
    words = ["baselines=[]", "algo.max_tokens=1", "data.max_response_tokens=1", "algo.prompts=3"]
    report = evaluated(tmp_path / "out", *words, "algo.enumerate=300", "algo.samples=64")
    found, own = report["enumerated"], report["policies"]["runs/demo/sft"]
    assert 200 < found["responses"] <= 280 and found["covered_least"] == pytest.approx(1, abs=1e-4)
    one, best = found["best_of"]["1"], found["best_of"]["64"]
    assert one["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert one["reward"]["mean"] == pytest.approx(own["reward"]["mean"], abs=0.1)
    assert 0 < best["kl"]["mean"] <= math.log(64) - 63 / 64
    curve = [(each["kl"]["mean"], each["reward"]["mean"]) for each in found["optimum"]]
    assert curve == sorted(curve)
    assert {"optimum", "best of n"} < {point["from"] for point in report["frontier"]}
    for wrong, line in {
        "algo.top_k=2": "algo.enumerate=9 is of plain sampling: set algo.top_k to 0",
        "reference=null": "algo.enumerate=9 needs reference=",
    }.items():
        with pytest.raises(UserError, match=line):
            evaluated(tmp_path / "no", *words, "algo.enumerate=9", wrong)


def test_the_best_is_one_with_a_score() -> None:
    nan = math.nan
    scores = torch.tensor([[1.0, 3.0, nan], [nan, nan, nan], [-9.0, nan, -math.inf]])
    assert best_places(scores) == [1, 3, 6]


@pytest.mark.slow
def test_responses_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = f"responses_cache={tmp_path}/cache"
    first = evaluated(tmp_path / "a", "baselines=[runs/demo/adapter]", cache)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    asked: list[int] = []
    sample = NativeEngine.sample

    def counting(self: NativeEngine, prompts: Any, *args: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        return sample(self, prompts, *args, **more)

    monkeypatch.setattr(NativeEngine, "sample", counting)
    again = evaluated(tmp_path / "b", "baselines=[runs/demo/adapter]", cache, "gold=length:2")
    assert not asked
    for name, figures in first["policies"].items():
        for each in ("reward", "kl", "entropy", "text", "length"):
            assert again["policies"][name][each] == figures[each], each
    evaluated(tmp_path / "c", "baselines=[]", cache, "algo.top_k=3")
    assert asked == [5]
    for file in (tmp_path / "cache").iterdir():
        file.write_text(file.read_text()[:-9])  # damaged: it is sampled anew
    assert evaluated(tmp_path / "d", "baselines=[]", cache)["policies"]
    assert asked == [5, 5]


def test_choices_are_asked_of_every_policy(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Greet {name}: ", "choices": [f"Hi {name}!", "zq#@ 99"], "answer": 0}
        for name in ("Ana", "Bdo", "Cla")
    ]
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluated(tmp_path / "out", "baselines=[runs/demo/adapter]", f"choices={file}")
    assert report["choices_by_chance"] == 0.5
    for figures in report["policies"].values():
        assert figures["choices"]["mean"] == 1
        assert figures["choices_change"]["mean"] == 0
    changed = report["policies"]["runs/demo/adapter"]["text_loss_change"]
    ours, base = (each["text_loss"] for each in report["policies"].values())
    assert changed["mean"] == pytest.approx(base - ours, abs=1e-4)


EVERYTHING = [
    *("baselines=[runs/demo/adapter]", "algo.temperatures=[0]", "algo.overlap=true"),
    *("best_of=runs/demo/adapter", "best_of_n=2", "algo.enumerate=5"),
    *("prompted=runs/demo/adapter", "few_shot=1", "data.max_response_tokens=7", "data.format=rows"),
    *("judge=runs/demo/sft", "judge_tie=0", "choices=choices.jsonl", "judge_prompt=question.txt"),
]


def everything(folder: Path, out: Path) -> dict[str, Any]:
    row = {"prompt": "Greet Ana: ", "choices": ["Hi Ana!", "No no."], "answer": 0}
    with contextlib.chdir(folder):
        Path("choices.jsonl").write_text(json.dumps(row))
        Path("question.txt").write_text("{prompt}{first}|{second}: ")
        caches = (f"responses_cache={out}-cache", f"data.cache={out}-answers")
        return evaluated(out, *EVERYTHING, *caches)


@pytest.mark.slow
def test_several_ranks_find_what_one_process_finds(chain: Path, tmp_path: Path) -> None:
    one = everything(chain, tmp_path / "one")
    first, second = on_ranks(2, everything, chain, tmp_path / "two")
    assert first == second
    assert one.keys() == first.keys()
    near(one, first, 1e-3)
    assert one["judge"]["calls"] == 56
