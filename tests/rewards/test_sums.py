"""Rewards of several terms, rewards of steps, and reward models of another vocabulary."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerBase,
)

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.folders.manifest import content_hash
from rlhf_cli.models.heads import init_head
from rlhf_cli.models.scorers import load_scorer
from rlhf_cli.rewards import functions, models, reading
from rlhf_cli.rewards.models import ModelReward
from rlhf_cli.rewards.reward import Reward, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from tests.toys import CHAT, bpe, characters, llama, run_of

NAN = math.nan


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are told."""
    lines: list[str] = []
    for module in (functions, reading):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


def load(spec: str, **data: Any) -> Reward:
    return load_reward(spec, run_of(**data), bpe(), torch.device("cpu"))


def rollouts_of(*texts: str, prompt: Any = "the cat", ended: bool = True) -> list[Rollout]:
    """Rollouts of a policy with the tokenizer `bpe`."""
    tokenizer = bpe()
    start = [tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False).input_ids]
    end = [tokenizer.eos_token_id] if ended else []
    return [
        Rollout(
            Prompt(prompt, {"answer": i}, f"f:{i + 1}"),
            Tokens(start, [*tokenizer(text, add_special_tokens=False).input_ids, *end]),
            [],
            "eos" if ended else "length",
            text,
        )
        for i, text in enumerate(texts)
    ]


def same(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float), equal_nan=True)


# --------------------------------------------------------------------------- sums

SOURCE = """
def some(prompts, responses):
    return [None if text == "c" else 10.0 for text in responses]
def none(prompts, responses):
    return [None] * len(prompts)
def of_steps(prompts, steps):
    return [[None if not s.strip() else float(len(s)) for s in each] for each in steps]
def whole(prompts, responses):
    return [float(len(text)) for text in responses]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(SOURCE)
    return tmp_path / "own.py"


def test_a_sum_weighs_what_applies(file: Path) -> None:
    some, none = f"{file}:some", f"{file}:none"
    scores = load(f"2*regex:a + -0.5*{some} + 0*length:1 + {none}").score(
        rollouts_of("a", "b", "c")
    )
    assert list(scores.parts) == ["regex:a", some, "length:1", none]
    same(scores.parts["regex:a"], [1, 0, 0])  # without weight
    same(scores.parts[some], [10, 10, NAN])
    same(scores.parts[none], [NAN] * 3)
    same(scores.total, [2 - 5, 0 - 5, 0])
    assert scores.steps is None and scores.ends is None
    assert list(scores.seconds) == list(scores.parts)
    assert all(seconds >= 0 for seconds in scores.seconds.values())


def test_a_response_without_a_term_that_counts_has_no_reward(file: Path) -> None:
    scores = load(f"3*{file}:some + 0*length:1").score(rollouts_of("a", "c"))
    same(scores.total, [30, NAN])


def test_every_term_is_measured_on_its_own(file: Path) -> None:
    some, none = f"{file}:some", f"{file}:none"
    reward = load(f"regex:a + 2*{some} + {none}")
    scores = reward.score(rollouts_of("a", "b", "c", "aa"))
    found = reward.metrics(scores)
    times = {name: value for name, value in found.items() if name.startswith("seconds/")}
    assert {name: found[name] for name in found if name not in times} == {
        "reward/regex:a/mean": 0.5,
        "reward/regex:a/std": 0.5,
        "reward/regex:a/none": 0,
        f"reward/{some}/mean": 10,
        f"reward/{some}/std": 0,
        f"reward/{some}/none": 0.25,
        f"reward/{none}/none": 1,
    }
    assert times == {f"seconds/reward/{spec}": took for spec, took in scores.seconds.items()}
    alone = load("regex:a")
    assert alone.metrics(alone.score(rollouts_of("a", "b")))["reward/regex:a/mean"] == 0.5


def test_a_term_that_fails_costs_the_whole_reward(tmp_path: Path) -> None:
    """But not where it has no weight, and not where it says that it does not apply."""
    (tmp_path / "own.py").write_text(
        "def f(prompts, responses):\n"
        "    return [{'a': 1.0, 'b': None}.get(text, 'no number') for text in responses]\n"
    )
    own = f"{tmp_path}/own.py:f"
    scores = load(f"regex:. + {own}").score(rollouts_of("a", "b", "c"))
    same(scores.total, [2, 1, NAN])
    same(scores.parts[own], [1, NAN, NAN])
    same(load(f"regex:. + 0*{own}").score(rollouts_of("a", "b", "c")).total, [1, 1, 1])


def test_every_term_is_checked(file: Path, tmp_path: Path) -> None:
    scorer(tmp_path / "one", bpe(), metrics={"eval/accuracy": 0.7})
    scorer(tmp_path / "two", bpe(), metrics={"eval/auc": 0.4})
    reward = load(f"exact_answer + {tmp_path}/one + {tmp_path}/two")
    told: list[Any] = []
    reward.check([Prompt("a", {"answer": 1})], lambda *all: told.append(all[:3]))
    assert told == [("reward[1]_accuracy", 0.7, True), ("reward[2]_accuracy", 0.4, False)]
    with pytest.raises(UserError, match="needs a column 'answer'"):
        reward.check([Prompt("a")], lambda *all: None)


# --------------------------------------------------------------------------- models


def scorer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, level: str = "response", **stage: Any
) -> None:
    """A random reward model with what its stage.json says."""
    config: Any = llama(len(tokenizer), **stage.pop("changes", {})).config
    config.num_labels = 1
    torch.manual_seed(0)
    if level == "response":
        model: Any = LlamaForSequenceClassification(config)
        init_head(model.score, 0)
    else:
        model = LlamaForTokenClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "stage.json").write_text(json.dumps({"kind": "reward", "level": level, **stage}))


def model_of(reward: Reward) -> Any:
    """The source of a reward of one model."""
    (term,) = reward.terms
    assert isinstance(term.source, ModelReward)
    return term.source


def test_a_critic_starts_from_the_first_model_that_it_can(tmp_path: Path) -> None:
    other = characters()
    scorer(tmp_path / "tokens", bpe(), "token", head={"aggregate": "mean", "step_end": None})
    scorer(tmp_path / "other", other)
    scorer(tmp_path / "first", bpe())
    scorer(tmp_path / "second", bpe())
    names = ["length:3", *(f"{tmp_path}/{name}" for name in ("tokens", "other", "first", "second"))]
    start = load(" + ".join(names)).critic_start
    assert start is not None and start.source.spec == f"{tmp_path}/first"
    assert load(" + ".join(names[:3])).critic_start is None
    lowered = [*names[:3], f"-2*{names[3]}", f"0.5*{names[4]}"]  # what is lowered is no start
    start = load(" + ".join(lowered)).critic_start
    assert start is not None and (start.weight, start.source.spec) == (0.5, f"{tmp_path}/second")


# --------------------------------------------------------------------------- another vocabulary


@torch.no_grad()
def score_at(folder: Path, ids: list[int]) -> float:
    """By the plain library, at the last token."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return float(model.score(hidden))


def test_a_model_of_another_vocabulary_reads_the_text(tmp_path: Path) -> None:
    """In its own ids and template, EOS where the rollout has one; statistics as ever."""
    other = characters(first=58, size=70)
    statistics = {"mean": 0.5, "std": 2.0}
    scorer(tmp_path, other, template="Q{prompt}_", reward=statistics)
    source = model_of(load(str(tmp_path), template="{prompt}!"))
    assert not source.shares_vocabulary

    def ids(text: str) -> list[int]:
        found: list[int] = other(text, add_special_tokens=False).input_ids
        return found

    for ended, end in ((True, [other.eos_token_id]), (False, [])):
        (rollout,) = rollouts_of("dog", prompt="cat", ended=ended)
        assert source.reader.sequences([rollout]) == [Tokens(ids("Qcat_"), [*ids("dog"), *end])]
        expected = (score_at(tmp_path, ids("Qcat_dog") + end) - 0.5) / 2
        assert source.score([rollout]).item() == pytest.approx(expected, abs=1e-5)


def test_without_a_stage_json_the_template_is_that_of_the_data(tmp_path: Path) -> None:
    other = characters(first=58, size=70)
    scorer(tmp_path, other)
    (tmp_path / "stage.json").unlink()
    source = model_of(load(str(tmp_path), template="{prompt}x"))
    (sequence,) = source.reader.sequences(rollouts_of("dog", prompt="cat"))
    assert sequence.prompt == other("catx", add_special_tokens=False).input_ids


def test_a_model_of_another_vocabulary_reads_dialogues_as_it_learned_to(tmp_path: Path) -> None:
    other = characters(first=58, size=70)
    other.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
    )
    other.chat_template = CHAT
    scorer(tmp_path, other, template="chat")
    reward = load(str(tmp_path))
    turns = [{"role": "user", "content": "cat"}]
    for prompt in ("cat", turns):
        for ended, end in ((True, "<|end|>"), (False, "")):
            (rollout,) = rollouts_of("dog", prompt=prompt, ended=ended)
            reward.check([rollout.row], lambda *all: None)
            (sequence,) = model_of(reward).reader.sequences([rollout])
            whole = f"{other.decode(sequence.prompt)}|{other.decode(sequence.response)}"
            assert whole.replace(" ", "") == f"<|user|>cat<|end|><|assistant|>|dog{end}"


def test_dialogues_need_a_chat_template(tmp_path: Path) -> None:
    scorer(tmp_path, characters(), template="{prompt}")
    reward = load(str(tmp_path))
    reward.check([Prompt("a")], lambda *all: None)
    with pytest.raises(UserError, match="has no chat template"):
        reward.check([Prompt([{"role": "user", "content": "a"}])], lambda *all: None)


@pytest.mark.parametrize("shares", [True, False])
def test_what_exceeds_the_context_loses_the_start_of_its_prompt(
    shares: bool, tmp_path: Path, said: list[str]
) -> None:
    tokenizer = bpe() if shares else characters(first=58, size=70)
    scorer(tmp_path, tokenizer, changes={"max_position_embeddings": 8})
    reward = load(str(tmp_path))
    source = model_of(reward)
    rollouts = rollouts_of("dog", "cat", "s" * 40, prompt="aaabbb")
    if shares:
        rollouts = [
            replace(each, tokens=Tokens([1, 5, 6, 7, 8, 9], [9] * size))
            for each, size in zip(rollouts, (4, 2, 8), strict=True)
        ]
    first, second, third = source.reader.sequences(rollouts)
    if shares:
        assert first == Tokens([1, 7, 8, 9], [9] * 4)  # the BOS stays
        assert second == rollouts[1].tokens
    else:
        assert first.prompt == tokenizer("abbb", add_special_tokens=False).input_ids
        assert len(first) == len(second) == 8
    assert third is None
    scores = reward.score(rollouts)
    assert scores.total.isnan().tolist() == [False, False, True]
    cuts = "1 of the first 3" if shares else "2 of the first 3"
    assert len(said) == 2
    assert "prompts are cut at their start" in said[0] and cuts in said[0]
    assert "responses exceed its context and get no reward (1 of the first 3" in said[1]
    reward.score(rollouts)
    assert len(said) == 2  # told once


def test_an_implicit_reward_of_another_vocabulary_reads_the_text(tmp_path: Path) -> None:
    other = characters(first=58, size=70)
    policy, reference = (llama(len(other), seed=seed) for seed in (3, 4))
    folder = tmp_path / "policy"
    policy.save_pretrained(folder)
    other.save_pretrained(folder)
    reference.save_pretrained(folder / "ref")
    said = {"beta": 0.3, "per_token": False, "reference": "ref"}
    said["hash"] = content_hash(str(folder / "ref"))
    (folder / "stage.json").write_text(json.dumps({"kind": "policy", "implicit_reward": said}))
    rollouts = rollouts_of("dog", prompt="cat")
    ids = [*other("catdog", add_special_tokens=False).input_ids, other.eos_token_id]
    with torch.no_grad():
        found = [
            model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (policy, reference)
        ]
    ratio = sum((found[0] - found[1])[t - 1, ids[t]].item() for t in range(3, len(ids)))
    total = load(str(folder)).score(rollouts).total
    assert total.item() == pytest.approx(0.3 * ratio, abs=1e-4)


# --------------------------------------------------------------------------- steps


def test_steps_of_a_function_and_of_whole_responses(file: Path) -> None:
    """Steps by data.step_end; what terms of whole responses say is kept apart from them."""
    spec = f"2*{file}:of_steps + 0.5*{file}:whole + -1*{file}:none"
    texts = ("the cat\nsat\nran", "dog", "a\nb")
    reward = load(spec, step_end="\n")
    rollouts = rollouts_of(*texts)
    scores = reward.score(rollouts, by_step=True)
    assert scores.steps is not None and scores.ends is not None
    same(scores.steps[0], [16, 8, 6])
    same(scores.steps[1], [6])
    same(scores.steps[2], [4, 2])
    assert scores.whole is not None
    same(scores.whole, [7.5, 1.5, 1.5])  # the term that never applies adds nothing
    same(scores.parts[f"{file}:of_steps"], [(8 + 4 + 3) / 3, 3, 1.5])  # the mean of its steps
    same(scores.parts[f"{file}:none"], [NAN] * 3)
    same(scores.total, [10 + 7.5, 6 + 1.5, 3 + 1.5])
    for rollout, ends, text in zip(rollouts, scores.ends, texts, strict=True):
        ids = rollout.tokens.response
        assert ends[-1] == len(ids) - 1  # the EOS
        shown = [bpe().decode(ids[: end + 1], skip_special_tokens=True) for end in ends]
        assert shown == [
            "\n".join(text.split("\n")[: i + 1]) + "\n" for i in range(len(ends) - 1)
        ] + [text]
    same(reward.score(rollouts).total, scores.total.tolist())  # of responses it is the same


def test_a_term_without_weight_judges_no_step(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "def f(prompts, steps):\n    return [[1.0] + [None] * (len(s) - 1) for s in steps]\n"
    )
    reward = load(f"{tmp_path}/other.py:f + 0*{file}:of_steps", step_end="\n")
    scores = reward.score(rollouts_of("a\nb", "c"), by_step=True)
    assert scores.steps is not None
    for steps, known in zip(scores.steps, ([1.0, NAN], [1.0]), strict=True):
        same(steps, known)


def test_an_unknown_step_stays_unknown(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def f(prompts, steps):\n"
        "    return [[None if s == 'b' else 2.0 for s in each] for each in steps]\n"
    )
    reward = load(f"{tmp_path}/own.py:f", step_end="\n")
    scores = reward.score(rollouts_of("a\nb", "b", ""), by_step=True)
    assert scores.steps is not None and scores.ends is not None
    for steps, known in zip(scores.steps, ([2.0, NAN], [NAN], [2.0]), strict=True):
        same(steps, known)
    assert scores.whole is not None and scores.whole.isnan().all()
    assert scores.ends[2] == [0]  # nothing but EOS is one empty step
    same(scores.total, [2, NAN, 2])


def test_without_a_judge_of_steps_it_is_all_of_the_whole() -> None:
    scores = load("3*length:2", step_end="\n").score(rollouts_of("a\nb", "c d"), by_step=True)
    assert scores.steps is not None and scores.whole is not None
    assert all(steps.isnan().all() for steps in scores.steps)
    same(scores.whole, [3, 3])


@pytest.mark.parametrize("shares", [True, False])
def test_a_step_model_gives_probabilities(shares: bool, tmp_path: Path) -> None:
    """At the end of each of its steps, by its own step_end, and without normalisation."""
    tokenizer = bpe() if shares else characters(first=58, size=70)
    head = {"aggregate": "product", "step_end": "t"}
    statistics = {"mean": 5.0, "std": 3.0}
    scorer(tmp_path, tokenizer, "step", head=head, reward=statistics, template="{prompt}")
    rollouts = rollouts_of("cat sat on", prompt="the cat" if shares else "the")
    reward = load(f"2*{tmp_path} + length:3", step_end="NEVER")
    scores = reward.score(rollouts, by_step=True)
    assert scores.steps is not None and scores.ends is not None

    (sequence,) = model_of(load(str(tmp_path))).reader.sequences(rollouts)
    assert (sequence == rollouts[0].tokens) is shares
    with torch.no_grad():
        model = LlamaForTokenClassification.from_pretrained(tmp_path).eval()
        logits = model(torch.tensor([sequence.prompt + sequence.response])).logits[0, :, 0]
    ids = sequence.response
    shown = [str(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
    places = [
        next(i for i, text in enumerate(shown) if text.replace(" ", "").startswith(start))
        for start in ("cat", "catsat")
    ]
    right = logits[len(sequence.prompt) :][[*places, len(ids) - 1]].sigmoid()
    torch.testing.assert_close(scores.steps[0], 2 * right)
    assert scores.whole is not None and scores.whole.tolist() == [1]
    assert scores.parts[str(tmp_path)].item() == pytest.approx(right.mean().item(), abs=1e-6)
    assert len(scores.ends[0]) == 3 and scores.ends[0][-1] == len(rollouts[0].tokens.response) - 1
    assert bpe().decode(rollouts[0].tokens.response[: scores.ends[0][0] + 1]) == "cat"


def test_other_steps_in_a_models_own_tokens_are_unknown(tmp_path: Path, said: list[str]) -> None:
    """A stop string that the text lost ends a step of the ids."""
    other = characters(first=58, size=70)
    scorer(tmp_path, other, "step", head={"aggregate": "min", "step_end": "t"})
    (rollout,) = rollouts_of("cat sat on")
    rollout = replace(rollout, text="cat s", finish_reason="stop")
    scores = load(str(tmp_path)).score([rollout], by_step=True)
    assert scores.steps is not None
    assert scores.steps[0].isnan().all() and scores.total.isnan().all()
    assert "1 of the first 1" in said[0] and "other steps in its own tokens" in said[0]


def test_judges_of_steps_must_cut_alike(file: Path, tmp_path: Path) -> None:
    for name, end in (("one", "\n"), ("two", "\n\n")):
        scorer(tmp_path / name, bpe(), "step", head={"aggregate": "min", "step_end": end})
    one, two, steps = tmp_path / "one", tmp_path / "two", f"{file}:of_steps"
    with pytest.raises(UserError, match="one ends steps by .* must cut a response alike"):
        load(f"{one} + {two}")
    with pytest.raises(UserError, match="of_steps by"):
        load(f"{two} + {steps}", step_end="\n")
    load(f"{one} + {steps} + {file}:whole", step_end="\n")


def test_a_reward_model_may_share_the_policys_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer(tmp_path, bpe())
    policy = llama(len(bpe()))
    lent: list[Any] = []

    def spy(*args: Any) -> Any:
        lent.append(args[-1])
        return load_scorer(*args)

    monkeypatch.setattr(models, "load_scorer", spy)
    load_reward(str(tmp_path), run_of(), bpe(), torch.device("cpu"), policy)
    assert lent == [policy]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_a_model_fails_at_costs_the_whole_reward(
    bad: float, tmp_path: Path, said: list[str]
) -> None:
    scorer(tmp_path, bpe(), "step", head={"aggregate": "product", "step_end": "t"})
    reward = load(f"{tmp_path} + length:3")
    judge: Any = reward.terms[0].source

    def spoil(module: Any, inputs: Any, scores: Tensor) -> Tensor:
        spoilt = scores.clone()  # (B, T, 1)
        spoilt[0, -1] = bad
        return spoilt

    judge.model.score.register_forward_hook(spoil)
    scores = reward.score(rollouts_of("cat sat on it", "cat sat"), by_step=True)
    assert scores.total.isnan().tolist() == [True, False]
    assert not scores.parts[str(tmp_path)].isinf().any()
    assert "not finite are no reward" in said[0] and "(1 of the first 2; told once)" in said[0]
    reward.score(rollouts_of("cat sat on it"), by_step=True)
    assert len(said) == 1
