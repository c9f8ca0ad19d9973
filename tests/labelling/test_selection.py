"""Which tasks are labelled: what is drawn has the chance that is said, and rules choose as told."""

import importlib
import json
import math
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.order import derived_seed
from rlhf_cli.labelling.draws import (
    Pool,
    candidates_of,
    chance_of,
    chance_to_be_first,
    in_turn,
    pool_of,
)
from rlhf_cli.labelling.selection import Design, chosen
from rlhf_cli.labelling.tasks import Sample, Task, dealt, read_tasks
from rlhf_cli.runs.machine_checks import check_labelling
from tests.tiny import run_stage

PAIRS = ["algo.protocol=pair", "algo.overlap=0", "algo.repeat=0"]
ONE, TWO = "scorers=['length:9']", "scorers=['length:9','regex:a']"


def tasks_of(samples: list[Sample], *words: str, judges: list[str] | None = None) -> list[Task]:
    algo: Any = compose(
        "label", [*PAIRS, "algo.samples=9", "source=reward", "reward=length:2", *words]
    ).algo
    return chosen(pool_of(samples, algo, 0)[0], algo, judges or ["x"], 0)


def scored(scores: dict[str, list[list[float | None]]]) -> list[Sample]:
    """Of each prompt a response for each list, with what judges x, y, ... say of it."""
    return [
        Sample(
            prompt,
            f"{prompt}{i}",
            "",
            {"policy": "a", "scores": dict(zip("xyz", each, strict=False))},
        )
        for prompt, said in scores.items()
        for i, each in enumerate(said)
    ]


def shown(tasks: list[Task]) -> list[tuple[str, ...]]:
    return [tuple(sorted(task.responses)) for task in tasks]


# --------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("policies", "places", "chance"),
    [
        ("aaaa", (0, 2), 1 / 6),  # one of C(4, 2)
        ("aaab", (0, 3), 1 / 3),  # each gives one: which of three
        ("aaab", (0, 1), 0.0),  # b has its turn
        ("aaab", (0, 1, 3), 1 / 3),  # b has no second one: two of three
        ("aabbc", (0, 1, 2, 4), 1 / 4),  # the fourth is of a or b, and one of two of the other
        ("aab", (0, 1, 2), 1.0),
    ],
)
def test_the_chance_to_be_shown_when_policies_take_turns(
    policies: str, places: tuple[int, ...], chance: float
) -> None:
    assert chance_to_be_first(policies, places) == pytest.approx(chance)
    said = [Sample("p", f"{i}", "", {"policy": each}) for i, each in enumerate(policies)]
    firsts = [candidates_of(said, len(places), 1, seed)[0] for seed in range(2000)]
    seen = sum(set(first) == set(places) for first in firsts) / 2000
    assert seen == pytest.approx(chance, abs=4 * math.sqrt(0.25 / 2000))


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 7, 10, 12])
def test_chances_of_all_tasks_add_up_to_how_many_are_drawn(tasks: int) -> None:
    """Prompts of 3, 4 and 4 responses: 3 + 6 + 6 pairs; the probability is of the task itself."""
    samples = [
        Sample(prompt, f"{policy}{i}", "", {"policy": policy})
        for prompt, wrote in {"p": "aab", "q": "aaab", "r": "aabb"}.items()
        for i, policy in enumerate(wrote)
    ]
    algo: Any = compose("label", [*PAIRS, f"algo.tasks={tasks}"]).algo
    pool, _ = pool_of(samples, algo, 0)
    drawn = chosen(pool, algo, [], 0)
    assert len(drawn) == tasks and len({task.id for task in drawn}) == tasks
    had = Counter(str(task.prompt) for task in drawn)
    assert max(had.values()) - min(had[each] for each in "qr") <= 1
    sets: list[list[tuple[int, ...]]] = [
        list(combinations(range(len(said)), 2)) for said in pool.prompts
    ]
    shares, left = list[float](), tasks  # of prompts with a pair left, in each round
    while left:
        have = sum(len(each) > len(shares) for each in sets)
        shares.append(min(1.0, left / have))
        left -= min(left, have)
    whole = Pool(pool.prompts, sets, 2, 6, tasks)
    chances = [
        chance_of(whole, i, place, shares)
        for i, each in enumerate(sets)
        for place in range(len(each))
    ]
    assert sum(chances) == pytest.approx(tasks) and max(chances) <= 1 + 1e-12
    for task in drawn:
        assert task.select is not None and task.select["rule"] == "random"
        texts = [sample.text for sample in pool.prompts["pqr".index(str(task.prompt))]]
        places = tuple(sorted(texts.index(text) for text in task.responses))
        i = "pqr".index(str(task.prompt))
        assert task.select["probability"] == pytest.approx(
            chance_of(whole, i, sets[i].index(places), shares)
        )


def test_policies_take_turns() -> None:
    order = in_turn("aaabbc", random.Random(0))
    assert sorted(order) == list(range(6))
    assert {"aaabbc"[i] for i in order[:3]} == set("abc") and {"aaabbc"[i] for i in order[3:5]} == {
        *"ab"
    }


def test_what_is_drawn_does_not_hang_on_scores() -> None:
    prompts = [f"p{i}" for i in range(20)]
    one = scored({each: [[float(i)] for i in range(4)] for each in prompts})
    other = scored({each: [[float(-(i**2))] for i in range(4)] for each in prompts})
    first, second = (tasks_of(each, "algo.select=gap", ONE) for each in (one, other))
    drawn = [[task for task in tasks if task.selected == "random"] for tasks in (first, second)]
    assert shown(drawn[0]) == shown(drawn[1]) and len(drawn[0]) == 6 and len(first) == 20
    assert {task.prompt for task in first} == set(prompts)  # one task of each
    chances = [task.select["probability"] for task in drawn[0] if task.select]
    assert chances == pytest.approx([0.3 / 6] * 6)  # of prompts 6 in 20, of pairs 1 in 6
    by_rule = [task for task in first if task.selected == "gap"]
    assert {shown([task])[0][1][-1] for task in by_rule} == {"3"}  # against the best of 0 to 3
    assert {task.select["probability"] for task in by_rule if task.select} == {1.0}
    assert tasks_of(one, "algo.select=gap", ONE) == first


# --------------------------------------------------------------------------- rules


def test_a_gap_is_chosen_and_of_equals_the_earlier() -> None:
    samples = scored({"p": [[0.0], [1.0]], "q": [[5.0], [4.0]], "r": [[0.0], [3.0], [9.0]]})
    words = ["algo.select=gap", ONE, "algo.explore=0"]
    assert shown(tasks_of(samples, *words, "algo.tasks=1")) == [("r0", "r2")]
    assert shown(tasks_of(samples, *words, "algo.tasks=2")) == [("p0", "p1"), ("r0", "r2")]
    # five tasks of three prompts: two of one, or three where others have no more
    five = shown(tasks_of(samples, *words, "algo.tasks=5"))
    assert Counter(pair[0][0] for pair in five) == {"p": 1, "q": 1, "r": 3}


def test_optimism_prefers_what_scorers_differ_on() -> None:
    samples = scored({"p": [[0.0, 0.0], [2.0, 2.0]], "q": [[0.0, 3.0], [3.0, 0.0]]})
    words = ["algo.select=gap", TWO, "algo.explore=0", "algo.tasks=1"]
    by_mean = tasks_of(samples, *words, "algo.optimism=0", judges=["x", "y"])
    hopeful = tasks_of(samples, *words, "algo.optimism=1", judges=["x", "y"])
    assert [by_mean[0].prompt, hopeful[0].prompt] == ["p", "q"]
    doubted = tasks_of(samples, *words[1:], "algo.select=disagree", judges=["x", "y"])
    assert doubted[0].prompt == "q"


def test_scores_of_judges_are_compared_in_their_own_units() -> None:
    """The second scorer says the same in thousands: it must not outvote the first."""
    samples = scored({"p": [[0.0, 4000.0], [9.0, 0.0]], "q": [[0.0, 0.0], [8.0, 1000.0]]})
    words = ["algo.select=gap", TWO, "algo.explore=0", "algo.tasks=1", "algo.optimism=0"]
    assert tasks_of(samples, *words, judges=["x", "y"])[0].prompt == "q"


def test_a_response_that_a_scorer_does_not_know_is_not_chosen() -> None:
    samples = scored({"p": [[0.0], [None], [1.0]], "q": [[None], [3.0]]})
    words = ["algo.select=gap", ONE, "algo.explore=0"]
    assert shown(tasks_of(samples, *words)) == [("p0", "p2")]


def with_states(states: dict[str, list[list[float]]], raw: float = 0.0) -> list[Sample]:
    return [
        Sample(prompt, f"{prompt}{i}", "", {"policy": "a"}, raw=raw, state=torch.tensor(each))
        for prompt, said in states.items()
        for i, each in enumerate(said)
    ]


def test_information_is_not_asked_for_twice() -> None:
    """Two prompts differ along one direction, the third by less along another."""
    samples = with_states(
        {"p": [[0.0, 0], [3, 0]], "q": [[0.0, 0], [3, 0]], "r": [[0.0, 0], [0, 2]]}
    )
    words = ["algo.select=fisher", ONE, "algo.explore=0"]
    two = tasks_of(samples, *words, "algo.tasks=2")
    assert shown(two) == [("p0", "p1"), ("r0", "r1")]
    # traces are 9 / 4, 9 / 4 and 4 / 4: 5.5 / 3 over 2 dimensions is there before
    gains = [math.log1p(9 / 4 * 12 / 11), math.log1p(12 / 11)]
    assert [task.select["score"] for task in two if task.select] == pytest.approx(gains)
    # what is drawn is known before: then the other direction tells more
    known = tasks_of(samples, *words[:2], "algo.explore=0.5", "algo.tasks=2")
    assert {task.selected for task in known} == {"random", "fisher"}
    assert {str(task.prompt) for task in known} in ({"p", "r"}, {"q", "r"})


@pytest.mark.parametrize("protocol", ["pair", "rank"])
def test_the_design_is_the_greedy_one(protocol: str) -> None:
    generator = torch.Generator().manual_seed(1)
    samples = [
        Sample(f"p{i}", f"{i}{j}", "", {"policy": "a"}, raw=float(raw), state=state)
        for i in range(6)
        for j, (raw, state) in enumerate(
            zip(
                torch.randn(5, generator=generator),
                torch.randn(5, 4, generator=generator),
                strict=True,
            )
        )
    ]
    samples[7] = Sample(
        "p1", "12", "", {"policy": "a"}, raw=math.nan, state=torch.full((4,), math.nan)
    )
    words = [*PAIRS, "source=reward", "reward=length:2", f"algo.protocol={protocol}", ONE]
    words += ["algo.select=fisher", "algo.explore=0", "algo.tasks=5"]
    words += ["algo.responses=3"] * (protocol == "rank")
    algo: Any = compose("label", words).algo
    pool, _ = pool_of(samples, algo, 0)
    design, naive = Design(pool), list[tuple[float, int, int]]()
    while len(naive) < 5:
        open_ = [i for i in range(6) if i not in [prompt for _, prompt, _ in naive]]
        gains = [best for i in open_ if (best := design.best(i)) is not None]
        naive.append(min(gains))
        design.add(*naive[-1][1:])
    tasks = chosen(pool, algo, [], 0)
    found = {str(task.prompt): task.select["score"] for task in tasks if task.select}
    assert found == pytest.approx({f"p{prompt}": -gain for gain, prompt, _ in naive})


def test_many_sets_of_responses_are_looked_at_in_part() -> None:
    samples = scored({"p": [[float(i)] for i in range(16)]})
    words = ["algo.select=gap", ONE, "algo.explore=0", "algo.protocol=rank"]
    (task,) = tasks_of(samples, *words)
    assert len(task.responses) == 4 and task.select and task.select["score"] > 0
    assert tasks_of(samples, *words) == [task]


def test_of_one_prompt_more_tasks_are_chosen_than_sets_are_looked_at() -> None:
    samples = scored({"p": [[float(i)] for i in range(205)]})
    tasks = tasks_of(samples, "algo.select=gap", ONE, "algo.tasks=204")
    assert len({task.id for task in tasks}) == 204


# --------------------------------------------------------------------------- as users run it


def label(out: Path, *more: str) -> Path:
    cfg: Any = compose("label", [*PAIRS, *more, f"out={out}"])
    made: Path = importlib.import_module("rlhf_cli.stages.label").run(cfg)
    return made


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_scorer_that_is_called_reward_is_not_what_labels() -> None:
    said = {"a": (9.0, 0.0), "b": (0.0, 5.0)}  # of the first response: what labels, the scorer
    samples = [
        Sample(prompt, f"{prompt}{i}", "", {"reward": i * gold, "scores": {"reward": i * score}})
        for prompt, (gold, score) in said.items()
        for i in range(2)
    ]
    words = ["algo.select=gap", "scorers=[reward]", "algo.explore=0", "algo.tasks=1"]
    assert tasks_of(samples, *words, judges=["reward"])[0].prompt == "b"


def stop(*given: object) -> None:
    raise KeyboardInterrupt


def given(file: Path, prompts: int) -> str:
    """samples=FILE of two policies: the longer a response, the higher its reward."""
    rows = [
        {"prompt": f"p{i}", "response": "x" * (1 + (7 * i + 3 * j) % 11), "policy": "ab"[j % 2]}
        for i in range(prompts)
        for j in range(6)
    ]
    text = [json.dumps({**row, "reward": len(row["response"])}) + "\n" for row in rows]
    file.write_text("".join(text))
    return f"samples={file}"


def test_figures_are_of_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever labels is right on what was drawn, and contrary on what the rule has chosen."""
    labels, out = tmp_path / "labels.jsonl", tmp_path / "out"
    words = [given(tmp_path / "s.jsonl", 30), "policy=null", "algo.select=gap", "algo.explore=0.4"]
    words += ["source=file", f"labels={labels}", "algo.overlap=0.4", "annotators=[one,two]"]
    with pytest.raises(RunError, match=r"tasks\.jsonl has the tasks"):
        label(out, *words)
    assert "30 tasks (12 at random, 18 by gap)" in capsys.readouterr().err
    tasks = {row["task"]: row for row in read(out / "tasks.jsonl")}
    told = [{**row["select"], "probability": 0} for row in tasks.values()]
    assert Counter(each["rule"] for each in told) == {"random": 12, "gap": 18}
    rows = []
    for task, row in tasks.items():
        longer = [len(each) for each in row["responses"]]
        right = [1, 2] if longer[0] > longer[1] else [2, 1]
        ranks = right if row["select"]["rule"] == "random" else right[::-1]
        rows += [{"task": task, "annotator": who, "ranks": ranks} for who in ("one", "two")]

    turns = dealt(read_tasks(out), ["one", "two"], 0.4, 0, derived_seed(0, "deal"))
    mine = {(who, turn.task.id) for who, own in turns.items() for turn in own}
    rows = [row for row in rows if (row["annotator"], row["task"]) in mine]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    label(out, *words)
    report = json.loads((out / "report.json").read_text())
    assert report["selected"]["gap"]["labels"] + report["selected"]["random"]["labels"] == len(rows)
    assert report["selected"]["random"] == {"tasks": 12, "labels": 24}  # all that both have
    assert report["with_reward"]["agreement"] == 1.0 and report["with_reward"]["tasks"] == 12
    assert report["between_annotators"]["tasks"] == 12
    assert "of the 24 drawn at random" in capsys.readouterr().err
    chosen_by = Counter(row["selected"] for row in read(out / "preferences.jsonl"))
    assert chosen_by == {"random": 24, "gap": 18}


def test_without_a_random_part_nothing_is_measured(tmp_path: Path) -> None:
    words = [given(tmp_path / "s.jsonl", 9), "policy=null", "algo.select=gap", "algo.explore=0"]
    labels, out = tmp_path / "labels.jsonl", tmp_path / "out"
    words += ["source=file", f"labels={labels}"]
    with pytest.raises(RunError, match=r"tasks\.jsonl has the tasks"):
        label(out, *words)
    rows = [{"task": row["task"], "ranks": [1, 2]} for row in read(out / "tasks.jsonl")]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = json.loads((label(out, *words) / "report.json").read_text())
    assert report["selected"]["random"] == {"tasks": 0, "labels": 0} and report["labels"] == 9
    assert report["with_reward"] is report["ratings"] is None and "ties" not in report


def test_tasks_from_before_there_were_rules_are_read(tmp_path: Path) -> None:
    given(tmp_path / "s.jsonl", 3)
    words = [f"samples={tmp_path / 's.jsonl'}", "policy=null", "source=reward"]
    out = label(tmp_path / "out", *words)
    rows = read(out / "tasks.jsonl")
    bare = [{name: each for name, each in row.items() if name != "select"} for row in rows]
    (out / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert {task.selected for task in read_tasks(out)} == {"random"}
    (out / "tasks.jsonl").write_text(json.dumps({**bare[0], "select": {"rule": 3}}))
    with pytest.raises(UserError, match=r"tasks\.jsonl:1: damaged: .*select"):
        read_tasks(out)


def test_a_reward_model_chooses_and_learns_from_what_it_chose(
    inside: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sampled, chosen by the head of a reward model, labelled by a rule, learnt from."""
    words = [
        "data=jsonl",
        "data.path=rows.jsonl",
        "data.max_response_tokens=8",
        "policy=runs/demo/sft",
    ]
    words += [
        "source=reward",
        "reward=length:4",
        "algo.select=fisher",
        "scorers=[runs/demo/reward]",
    ]
    words += ["algo.samples=5", "algo.prompts=24", "algo.explore=0.5", "hardware.threads=1"]
    first = label(tmp_path / "one", *words)
    with monkeypatch.context() as stopped:  # once all is sampled, before any task is written
        stopped.setattr("rlhf_cli.stages.label.write_tasks", stop)
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path / "two", *words)
    assert not (tmp_path / "two" / "tasks.jsonl").exists()
    again = label(tmp_path / "two", *words)
    assert (first / "tasks.jsonl").read_bytes() == (again / "tasks.jsonl").read_bytes()
    tasks = read_tasks(first)
    assert Counter(task.selected for task in tasks) == {"random": 12, "fisher": 12}
    assert all(
        set(each["scores"]) == {"runs/demo/reward"} for task in tasks for each in task.origins
    )
    out = tmp_path / "reward"
    data = [
        f"data.path={first / 'preferences.jsonl'}",
        "data.eval_share=0.5",
        "data.eval_rows=null",
    ]
    run_stage("reward", out, *data, "algo.max_steps=2")
    parts = json.loads((out / "report.json").read_text())["by_selected"]
    assert [each["selected"] for each in parts] == ["fisher", "random"]
    assert "selected by random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo.select=gap"], "needs a reward to choose by; give scorers"),
        (["algo.select=disagree", "reward=length:9"], "needs two rewards that may differ"),
        (["algo.select=gap", "source=reward", "reward=length:9"], "length:9 is what labels"),
        (
            ["algo.select=fisher", "reward=length:9", "scorers=['length:8']"],
            "one reward model .* reward=, length:8",
        ),
        (["algo.select=disagree", "reward=length:9", ONE], "would hear length:9 twice"),
        (["algo.select=gap", ONE, "algo.protocol=thumbs"], "algo.protocol=thumbs has one"),
        (["algo.select=gap", ONE, "algo.samples=2"], "nothing to choose from: 2 responses"),
        (["algo.explore=0.5"], "algo.explore is not used by algo.select=random"),
        ([ONE], "scorers is not used by algo.select=random"),
        (["algo.select=fisher", "reward=length:9", "algo.optimism=2"], "optimism is not used"),
        (["policy=null", "samples=s.jsonl", "algo.select=gap", ONE], "scorers=.* policy's tokens"),
    ],
)
def test_what_a_rule_lacks_is_said(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose("label", [*PAIRS, *words])


def test_a_rule_is_no_reward_model_to_look_into() -> None:
    cfg = compose("label", [*PAIRS, "algo.select=fisher", "reward=length:9"])
    with pytest.raises(UserError, match="whole responses, which length:9 is not"):
        check_labelling(cfg)


def test_a_file_without_rewards_is_named(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "response": x}) + "\n" for x in "abc"))
    with pytest.raises(UserError, match="no response has a score of reward"):
        label(tmp_path / "out", f"samples={file}", "policy=null", "algo.select=gap", "algo.tasks=1")
