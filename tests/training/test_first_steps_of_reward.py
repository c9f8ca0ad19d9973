"""The first step of each reward loss, computed once more from the logits of plain transformers.

All rows are one optimizer step, in small micro-batches, at a rate so small that no weight moves: so
loss and held-out figures are both those of the folder that the stage writes.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from rlhf_cli.config.compose import compose
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.data.kinds import Demonstration, Feedback, Preference, Prompt, Ranking, Stepwise
from rlhf_cli.data.rows import read_split
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.rewards.reward import load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.stages import reward
from tests.tiny import run_stage, words_of
from tests.toys import FROZEN, run_of

CPU = torch.device("cpu")
ONE = [
    *("algo.batch_size=500", "algo.epochs=1", "algo.lr=1e-9", "hardware.save_every=null"),
    "hardware.tokens_per_microbatch=100",
]
RANKINGS, FEEDBACK, STEPS = (
    f"data.path={file}.jsonl" for file in ("rankings", "feedback", "steps")
)
SOFTENED = ["algo.row_margin=true", "algo.label_smoothing=0.2", "algo.centring=0.3"]
CASES: dict[str, tuple[list[str], type]] = {
    "bradley_terry": ([], Preference),
    "bradley_terry with all": (SOFTENED, Preference),
    "soft labels": (["algo.soft_labels=true"], Preference),
    "kwise": (["algo=kwise", RANKINGS], Ranking),
    "plackett_luce": (["algo=plackett_luce", RANKINGS], Ranking),
    "label": (["algo=pointwise", FEEDBACK], Feedback),
    "score": (["algo=pointwise", "algo.target=score", FEEDBACK], Feedback),
    "steps": (["algo=process", STEPS], Stepwise),
    "steps, the least": (["algo=process", "algo.aggregate=min", STEPS], Stepwise),
    "token": (["algo=token", *SOFTENED], Preference),
    "token, the sum": (["algo=token", "algo.aggregate=sum"], Preference),
}


@pytest.fixture(autouse=True)
def inside(chain: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would."""
    with contextlib.chdir(chain):
        yield


def plain(auto: Any, place: Path) -> Any:
    """As a plain transformers user loads it: every weight found, none left over."""
    model, info = auto.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.num_labels == 1
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, item: Answers) -> list[Tensor]:
    """Of each response: () of a sequence classifier, (length,) of a token classifier."""
    found = []
    for response in item.responses:
        logits = model(torch.tensor([item.prompt + response])).logits[0, ..., 0].double()
        found.append(logits if logits.ndim == 0 else logits[len(item.prompt) :])
    return found


def step_ends(item: Answers, encoder: Encoder) -> list[int]:
    """Where the steps that are whole end: where the text so far first holds each of them."""
    (response,) = item.responses
    texts = [encoder.text(response[: place + 1]) for place in range(len(response))]
    written = ["\n".join(item.row.steps[:count]) for count in range(1, len(item.row.steps))]
    ends = [
        next(place for place, text in enumerate(texts) if text.startswith(f"{whole}\n"))
        for whole in written
        if any(text.startswith(f"{whole}\n") for text in texts)
    ]
    ended = response[-1] == encoder.tokenizer.eos_token_id
    return [*ends, len(response) - 1] if ended else ends


def logistic(logit: Tensor, label: float) -> Tensor:
    return -label * logsigmoid(logit) - (1 - label) * logsigmoid(-logit)


def below(ranks: list[float], i: int) -> list[int]:
    """The responses that rank strictly below one."""
    return [j for j, rank in enumerate(ranks) if rank > ranks[i]]


def losses_of(model: Any, item: Answers, algo: Any, encoder: Encoder) -> list[Tensor]:
    """The losses that a row adds to the mean: one, or one for each step."""
    row, scores = item.row, logits_of(model, item)
    if algo.loss in ("bradley_terry", "token"):
        if algo.loss == "token":
            scores = [each.mean() if algo.aggregate == "mean" else each.sum() for each in scores]
        d = scores[0] - scores[1] - (row.margin if algo.row_margin else 0.0)
        e = 1 - row.p if algo.soft_labels else algo.label_smoothing
        loss = -(1 - e) * logsigmoid(d) - e * logsigmoid(-d)
        return [loss + algo.centring * (scores[0] + scores[1]) ** 2]
    if algo.loss == "kwise":  # the mean of its pair losses, of which ties have none
        pairs = list(combinations(range(len(scores)), 2))
        found = [-logsigmoid(scores[i] - scores[j]) for i, j in pairs if j in below(row.ranks, i)]
        found += [-logsigmoid(scores[j] - scores[i]) for i, j in pairs if i in below(row.ranks, j)]
        return [torch.stack(found).sum() / len(pairs)]
    if algo.loss == "plackett_luce":
        every = torch.stack(scores)
        picks = [
            torch.logsumexp(every[[i, *below(row.ranks, i)]], 0) - every[i]
            for i in range(len(every))
        ]
        return [torch.stack(picks).sum()]
    if algo.loss == "process":
        ends = step_ends(item, encoder)
        pairs_of = zip(ends, row.labels, strict=False)  # what was cut has no label
        return [logistic(scores[0][end], label) for end, label in pairs_of]
    if algo.target == "score":
        return [(scores[0] - row.score) ** 2]
    return [logistic(scores[0], float(row.label))]


def score_of(model: Any, sequence: Tokens, algo: Any, encoder: Encoder) -> Tensor:
    """The one score of a response, ()."""
    (scores,) = logits_of(model, Answers(sequence.prompt, [sequence.response], None))
    if algo.loss == "process":
        texts = encoder.text(sequence.response).split("\n")
        row = Stepwise("p", texts, [1.0] * len(texts))
        ends = step_ends(Answers(sequence.prompt, [sequence.response], row), encoder)
        ends = sorted({*ends, len(sequence.response) - 1})  # a step that is cut is one to judge
        logits = scores[ends]
        return logsigmoid(logits).sum() if algo.aggregate == "product" else logits.min()
    if algo.loss == "token":
        return scores.mean() if algo.aggregate == "mean" else scores.sum()
    return scores


@pytest.mark.parametrize("name", CASES)
def test_the_first_step(name: str, tmp_path: Path) -> None:
    words, kind = CASES[name]
    cfg = compose("reward", [*words_of("reward"), *ONE, *words, f"out={tmp_path}"])
    reward.run(cfg)
    (entry,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    manifest = json.loads((tmp_path / "stage.json").read_text())

    level = {"process": "step", "token": "token"}.get(cfg.algo.loss, "response")
    whole = level == "response"
    auto = AutoModelForSequenceClassification if whole else AutoModelForTokenClassification
    model = plain(auto, tmp_path)
    assert manifest["level"] == level
    assert manifest["head"] == {
        "name": "score",
        "loss": cfg.algo.loss,
        "target": cfg.algo.target,
        "aggregate": cfg.algo.aggregate,
        "step_end": "\n" if level == "step" else None,
        "centring": cfg.algo.centring,
    }

    encoder = Encoder(load_tokenizer("runs/demo/sft", FROZEN), cfg.data)
    split = read_split(cfg.data, kind)
    train = encoder.answers(split.train)
    losses = [each for item in train for each in losses_of(model, item, cfg.algo, encoder)]
    assert entry["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    if kind is Stepwise:
        counts = [len(losses_of(model, item, cfg.algo, encoder)) for item in train]
        cut = [len(item.row.steps) > count for item, count in zip(train, counts, strict=True)]
        assert any(cut) and not all(cut)
        assert [len(item.ends) for item in train] == counts

    # held-out rows are judged by the scores alone: no margin, doubt or centring
    held_out = encoder.answers(split.held_out)
    off = {"row_margin": False, "label_smoothing": 0.0, "soft_labels": False, "centring": 0.0}
    plain_algo = replace(cfg.algo, **off)
    if kind is Ranking:
        pairs = [
            -logsigmoid(scores[i] - scores[j])
            for item in held_out
            for scores in [logits_of(model, item)]
            for i in range(len(scores))
            for j in below(item.row.ranks, i)
        ]
    else:
        pairs = [each for item in held_out for each in losses_of(model, item, plain_algo, encoder)]
    figure = "mse" if cfg.algo.target == "score" else "loss"
    expected = torch.stack(pairs).mean().item()
    assert entry[f"eval/{figure}"] == pytest.approx(expected, rel=1e-4)
    assert manifest["metrics"][f"eval/{figure}"] == entry[f"eval/{figure}"]

    # a whole folder is a reward: its scale is that of the scores of demonstrations, read as it says
    source: Any = load_reward(str(tmp_path), run_of(), encoder.tokenizer, CPU).terms[0].source
    demonstrations = encoder.demonstrations(read_split(cfg.data, Demonstration).train)
    raw = torch.stack([score_of(model, each, cfg.algo, encoder) for each in demonstrations])
    assert (source.mean, source.std) == pytest.approx((raw.mean().item(), raw.std().item()), 1e-3)
    rollouts = [Rollout(Prompt("p"), each, [], "eos", "") for each in demonstrations]
    normalised = (raw - raw.mean()) / raw.std()
    assert source.score(rollouts).tolist() == pytest.approx(normalised.tolist(), abs=1e-4)


def test_the_best_weights_are_those_of_the_trained_objective(tmp_path: Path) -> None:
    """Strong centring rules the objective, whatever the plain loss of the pairs does."""
    words = ["algo.keep=best", "algo.centring=50", "algo.epochs=6", "algo.eval_every=1"]
    log = run_stage("reward", tmp_path / "out", *words, "algo.lr=2e-2")
    best = min(log, key=lambda line: line["eval/objective"])
    said = json.loads((tmp_path / "out" / "stage.json").read_text())["metrics"]
    assert said["eval/loss"] == pytest.approx(best["eval/loss"], rel=1e-4)
    assert best is not min(log, key=lambda line: line["eval/loss"])
