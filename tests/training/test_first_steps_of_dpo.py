"""The first step of each preference loss, computed once more by the letter of its equation.

All rows are one optimizer step, in small micro-batches. What it logs of the training rows is that
of the start, where policy and reference are one; what it logs of the held-out rows is that of the
two folders, whose log-probs come from plain logits here.
"""

import contextlib
import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from rlhf_cli.config.compose import compose
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.data.kinds import Feedback, Preference, Ranking
from rlhf_cli.data.rows import read_split
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.preferences.items import PreferenceItems
from rlhf_cli.rewards.reward import load_reward
from tests.contents import without_times
from tests.tiny import words_of
from tests.toys import FROZEN, run_of

CPU = torch.device("cpu")
ONE = [
    *("algo.batch_size=500", "algo.epochs=1", "algo.warmup_steps=0", "algo.lr=1e-2"),
    *("hardware.tokens_per_microbatch=100", "hardware.save_every=null"),
]
RANKINGS, FEEDBACK = "data.path=rankings.jsonl", "data.path=feedback.jsonl"
KINDS = {"plackett_luce": Ranking, "kto": Feedback}
AVERAGED = ("length_normalised", "ipo_mean", "orpo", "simpo")
ALONE = ("orpo", "simpo", "preferred_ft", "unlikelihood")

# name -> (words, the loss at the start where it is known beforehand)
CASES: dict[str, tuple[list[str], float | None]] = {
    "dpo": (["algo.label_smoothing=0.1", "algo.beta=0.3"], math.log(2)),
    "dpo with sft": (["algo.sft_coef=0.5"], None),
    "length_normalised": (
        ["algo=length_normalised", "algo.beta=3", "algo.label_smoothing=0.1"],
        math.log(2),
    ),
    "soft labels": (["algo.soft_labels=true", "algo.beta=0.3"], math.log(2)),
    "length_normalised, soft": (
        ["algo=length_normalised", "algo.beta=3", "algo.soft_labels=true"],
        math.log(2),
    ),
    "robust": (["algo=robust", "algo.label_smoothing=0.2"], math.log(2)),
    "ipo": (["algo=ipo", "algo.beta=null", "algo.tau=0.2"], 1 / (4 * 0.2**2)),
    "ipo_mean": (["algo=ipo_mean", "algo.beta=null", "algo.tau=0.7"], 1 / (4 * 0.7**2)),
    "ipo, soft": (["algo=ipo", "algo.beta=null", "algo.soft_labels=true"], None),
    "hinge": (["algo=hinge", "algo.beta=0.3"], 1.0),
    "plackett_luce": (["algo=plackett_luce", RANKINGS], None),
    "kto": (
        ["algo=kto", "algo.desirable_weight=1.5", "algo.undesirable_weight=0", FEEDBACK],
        None,
    ),
    "kto balanced": (["algo=kto", "algo.sft_coef=0.2", FEEDBACK], None),
    "orpo": (["algo=orpo", "algo.beta=null", "algo.lam=0.4"], None),
    "simpo": (["algo=simpo", "algo.beta=2", "algo.gamma=0.5"], None),
    "preferred_ft": (["algo=preferred_ft", "algo.beta=null"], None),
    "unlikelihood": (["algo=unlikelihood", "algo.beta=null", "algo.alpha=0.3"], None),
}


@pytest.fixture(autouse=True)
def inside(chain: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would."""
    with contextlib.chdir(chain):
        yield


def run(out: Path, *more: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    cfg = compose("dpo", [*words_of("dpo"), *more, f"out={out}"])
    importlib.import_module("rlhf_cli.stages.dpo").run(cfg)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def model_of(place: str | Path) -> Any:
    """As plain transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(place).eval()


@torch.no_grad()
def sums(model: Any, items: list[Answers]) -> list[Tensor]:
    """Per item the log-probs of its responses, (K,), from plain logits, each alone."""
    found = []
    for item in items:
        each = []
        for response in item.responses:
            logits = model(torch.tensor([item.prompt + response])).logits[0]
            logprobs = torch.log_softmax(logits[len(item.prompt) - 1 : -1].double(), -1)
            each.append(logprobs.gather(-1, torch.tensor(response)[:, None]).sum())
        found.append(torch.stack(each))
    return found


def ends_of(row: Any) -> tuple[int, int]:
    """The places of the best and the worst response."""
    if isinstance(row, Preference):
        return 0, 1
    if isinstance(row, Feedback):
        return 0, 0
    worst = max(i for i, rank in enumerate(row.ranks) if rank == max(row.ranks))
    return row.ranks.index(min(row.ranks)), worst


def is_good(row: Any) -> bool:
    """Whether the best response of a row is one to imitate."""
    return not isinstance(row, Feedback) or bool(row.label)


def nll_per_token(items: list[Answers], ours: list[Tensor]) -> float:
    """Of good responses alone, over all of their tokens."""
    places = [(i, ends_of(item.row)[0]) for i, item in enumerate(items) if is_good(item.row)]
    tokens = sum(len(items[i].responses[best]) for i, best in places)
    return -sum(ours[i][best].item() for i, best in places) / tokens


def by_hand(
    items: list[Answers],
    ours: list[Tensor],
    theirs: list[Tensor],
    algo: Any,
    weights: tuple[float, float],
    z0: float = 0.0,
) -> dict[str, float]:
    """Mean loss and what is logged beside it, for log-probs under the policy and the reference."""
    loss = algo.loss
    rhos = [a if loss in ALONE else a - b for a, b in zip(ours, theirs, strict=True)]
    if loss in AVERAGED:
        lengths = [torch.tensor([len(response) for response in each.responses]) for each in items]
        rhos = [rho / length for rho, length in zip(rhos, lengths, strict=True)]
    scale = algo.tau if "ipo" in loss else algo.beta or 1.0
    good = [is_good(item.row) for item in items]
    places = [ends_of(item.row) for item in items]

    nll = nll_per_token(items, ours)
    losses = []
    for item, rho, logprobs, liked, (b, w) in zip(items, rhos, ours, good, places, strict=True):
        x, h = scale * rho, rho[b] - rho[w]
        smooth = 1 - item.row.p if algo.soft_labels else algo.label_smoothing
        if loss in ("dpo", "length_normalised"):
            value = -(1 - smooth) * logsigmoid(scale * h) - smooth * logsigmoid(-scale * h)
        elif loss == "robust":
            value = -(1 - smooth) * logsigmoid(scale * h) + smooth * logsigmoid(-scale * h)
            value = value / (1 - 2 * smooth)
        elif "ipo" in loss:
            p = item.row.p if algo.soft_labels else 1
            value = (h - (2 * p - 1) / (2 * algo.tau)) ** 2
        elif loss == "hinge":
            value = (1 - scale * h).clamp(min=0)
        elif loss == "plackett_luce":
            ranks = item.row.ranks
            below = [[j for j in range(len(x)) if ranks[j] > ranks[i]] for i in range(len(x))]
            value = sum(
                (torch.logsumexp(x[[i, *below[i]]], 0) - x[i] for i in range(len(x))),
                start=torch.tensor(0.0),
            )
        elif loss == "kto":
            gain = rho[0] - z0 if liked else z0 - rho[0]
            value = (weights[0] if liked else weights[1]) * (1 - torch.sigmoid(scale * gain))
        elif loss == "orpo":
            odds = torch.log(rho.exp() / (1 - rho.exp()))
            value = nll - algo.lam * logsigmoid(odds[b] - odds[w])
        elif loss == "simpo":
            value = -logsigmoid(scale * h - algo.gamma)
        elif loss == "unlikelihood":
            value = -logprobs[b] + algo.alpha * logprobs[w]
        else:
            assert loss == "preferred_ft"
            value = torch.tensor(nll)
        losses.append(value + algo.sft_coef * nll)
    mean = {"loss": torch.stack(losses).mean().item()}

    def over(values: list[Tensor]) -> float:
        return torch.stack(values).mean().item()

    n = range(len(items))
    if loss == "kto":
        for side, liked in (("chosen", True), ("rejected", False)):
            members = [i for i in n if good[i] == liked]
            mean[f"rewards/{side}"] = over([scale * rhos[i][0] for i in members])
            mean[f"logprobs/{side}"] = over([ours[i][0] for i in members])
        mean["rewards/accuracy"] = sum((rhos[i][0] > z0).item() == good[i] for i in n) / len(n)
    else:
        best, worst = ([rhos[i][places[i][side]] for i in n] for side in (0, 1))
        for place, side in enumerate(("chosen", "rejected")):
            mean[f"rewards/{side}"] = scale * over((best, worst)[place])
            mean[f"logprobs/{side}"] = over([ours[i][places[i][place]] for i in n])
        h = torch.stack(best) - torch.stack(worst)
        mean["rewards/accuracy"] = ((h > 0).double() + 0.5 * (h == 0).double()).mean().item()
        if loss in ("dpo", "length_normalised"):
            doubt = [1 - item.row.p for item in items] if algo.soft_labels else algo.label_smoothing
            weight = torch.sigmoid(-scale * h) - torch.tensor(doubt)
            mean["gradient_weight"] = weight.abs().mean().item()
    mean["rewards/margin"] = mean["rewards/chosen"] - mean["rewards/rejected"]
    return mean


@pytest.mark.parametrize("name", CASES)
def test_the_first_step(name: str, tmp_path: Path) -> None:
    words, at_start = CASES[name]
    (entry,) = run(tmp_path, *ONE, *words)
    cfg = compose("dpo", [*words_of("dpo"), *ONE, *words])
    algo = cfg.algo
    encoder = Encoder(load_tokenizer("runs/demo/sft", FROZEN), cfg.data)
    rows = read_split(cfg.data, KINDS.get(algo.loss, Preference))
    start, after = model_of("runs/demo/sft"), model_of(tmp_path)

    train = encoder.answers(rows.train)
    before = sums(start, train)
    good = sum(is_good(row) for row in rows.train)
    weights = 1.5, 0.0
    if name == "kto balanced":  # lambda_D n_D = lambda_U n_U, and the larger side has weight 1
        weights = 1.0, good / (len(train) - good)
    expected = by_hand(train, before, before, algo, weights)
    if name == "kto":
        assert entry["loss"] == pytest.approx(0.5 * 1.5 * good / len(train), abs=1e-5)
    if at_start is not None:
        assert entry["loss"] == pytest.approx(at_start, abs=1e-5)
    if algo.loss == "plackett_luce":  # a factor for each response that has worse ones, K! in all
        worse = [[sum(a > b for a in row.ranks) for b in row.ranks] for row in rows.train]
        logs = [sum(math.log(1 + count) for count in counts) for counts in worse]
        assert entry["loss"] == pytest.approx(sum(logs) / len(logs), abs=1e-5)
    if algo.loss not in ALONE:  # of margins of 0, whatever sign rounding gives them
        expected["rewards/accuracy"] = 0.5
    for figure, value in expected.items():
        assert entry[figure] == pytest.approx(value, rel=1e-4, abs=1e-5), figure

    held_out = encoder.answers(rows.held_out)
    z0 = 0.0
    if algo.loss == "kto":
        found = PreferenceItems(held_out, cfg, "held-out")
        partners = [each.mismatched.answers for each in found if each.mismatched is not None]
        assert len(partners) == len(held_out)
        rho = torch.cat(sums(after, partners)) - torch.cat(sums(start, partners))
        z0 = max(0.0, rho.mean().item())
        assert entry["z0"] == pytest.approx(0, abs=1e-6) and (z0 > 0.01 or name != "kto")
    expected = by_hand(held_out, sums(after, held_out), sums(start, held_out), algo, weights, z0)
    for figure, value in expected.items():
        assert entry[f"eval/{figure}"] == pytest.approx(value, rel=1e-3, abs=1e-4), figure
    assert expected["rewards/margin"] > 0.01  # it has learned something
    beside = {"eval/kl"} if algo.loss not in ALONE else set()
    assert {key for key in entry if key.startswith("eval/")} == beside | {
        f"eval/{figure}" for figure in expected
    }
    extra = {"step", "lr", "grad_norm/policy", "skipped", "tokens_per_second", "peak_memory"}
    extra |= {"z0"} if algo.loss == "kto" else set()
    assert {key for key in entry if not key.startswith("eval/")} == extra | set(expected)
    # as a reward, the policy has the scale of what is good
    manifest = json.loads((tmp_path / "stage.json").read_text())
    assert ("implicit_reward" in manifest) == (algo.loss not in ALONE)
    if "implicit_reward" in manifest:
        source: Any = load_reward(str(tmp_path), run_of(), encoder.tokenizer, CPU).terms[0].source
        sequences = [
            Tokens(item.prompt, item.responses[ends_of(item.row)[0]])
            for item in held_out
            if is_good(item.row)
        ]
        raw = source.raw(sequences)
        assert raw.mean().item() == pytest.approx(expected["rewards/chosen"], abs=1e-4)
        mean, std = raw.mean().item(), raw.std().item()
        assert (source.mean, source.std) == pytest.approx((mean, std), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_certain_soft_labels_train_as_hard_ones_do_to_the_bit(loss: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    file = tmp_path / "sure.jsonl"
    file.write_text("".join(json.dumps({**row, "p": 1}) + "\n" for row in rows))
    words = [*ONE, f"algo={loss}", f"data.path={file}", "algo.batch_size=16"]
    words += ["algo.beta=null"] if loss == "ipo" else []
    logs = [
        run(tmp_path / name, *words, *more)
        for name, more in (("hard", []), ("soft", ["algo.soft_labels=true"]))
    ]
    hard, soft = ([without_times(line) for line in log] for log in logs)
    assert hard == soft and len(hard) > 1
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hard", "soft")]
    assert weights[0] == weights[1]


def test_a_partner_of_kto_answers_another_prompt() -> None:
    """Each prompt stands with the response to another one, and hardly a row is passed over."""
    cfg = compose("dpo", [*words_of("dpo"), *CASES["kto"][0]])
    encoder = Encoder(load_tokenizer("runs/demo/sft", FROZEN), cfg.data)
    answers = encoder.answers(read_split(cfg.data, Feedback).train)
    # a good response names its prompt's name, so it is that of one prompt only
    good = {tuple(each.responses[0]): each.prompt for each in answers if each.row.label}
    orders = []
    for seed in range(10):
        seeded = replace(cfg, seed=seed)
        items = PreferenceItems(answers, seeded, "training")
        assert [item.answers for item in items] == answers
        partners = [item.mismatched.answers for item in items if item.mismatched is not None]
        for item, partner in zip(answers, partners, strict=True):
            assert partner.prompt == item.prompt
            assert good.get(tuple(partner.responses[0])) != item.prompt
        orders.append([each.responses for each in partners])
        assert len(set(good) - {tuple(each.responses[0]) for each in partners}) <= 3
        again = PreferenceItems(answers, seeded, "training")
        assert [each.mismatched for each in again] == [each.mismatched for each in items]
    assert orders[0] != orders[1]
