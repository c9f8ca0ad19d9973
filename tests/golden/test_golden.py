"""Figures of public code (vectors.json: inputs, outputs, gradients, source) against ours.

Each case passes within its own tolerance. It was recorded in float64; where a function of ours
works in float32 (forward passes, decoding), the tolerance is 1e4 times as large, at most 1e-4.

What public code does otherwise, on purpose or not, is left out:

- trl_dpo: nca_pair, sppo_hard, aot, apo_down, use_weighting and other divergences: not offered.
- elo, passk: not offered; nor is best-of-n (analytic).
- reward_shaping/torchtune_penalty_mask: a penalty for short responses too.
- collate/dpo_ml4_keep_end: prompt and response share one limit; here each has its own.
- verify/gsm8k_extract: the first `####` counts there and text after the number is ignored.
- lora/rslora, model/tiny_gpt2: not this package's arithmetic, or not offered.

What passes by our functions though public code goes another way:

- ppo_rollout/*: the score, and a last value, stand on the token after the EOS, where here they are
  on the EOS: our functions get that longer mask. The rule for a missing EOS is taken as recorded.
- whiten, advantages of gae, ppo_rollout/trl and reinforce_pp: variances of ddof 1, or an eps that
  is added to the deviation; ours, of ddof 0, are rescaled by the ratio of the deviations.
- gae/cleanrl_episode_boundary: episodes follow each other, and the last one is cut; each is a row
  of ours, with the value of what follows added to the last reward.
- ppo_loss/openrlhf_gspo: an advantage of one token reaches all tokens of its response; in our token
  form it stays at its own. The loss and the gradient of each response agree, those of tokens do
  not. There it averages per response first, whatever token_level_loss says.
- grpo_loss/trl_luspo: GSPO's ratio with the sum over tokens, and not their mean.
- grpo_loss/trl_cispo: its epsilon_high is the largest weight, here the room above 1.
- grpo_loss/*ga=*, agg_loss/openrlhf: counts of all micro-batches or devices, as optimize.py's.
- grpo_loss/verl_gpg: the policy gradient without a ratio.
- rloo_loss: one ratio of the summed log-probs for each response.
- group_adv/remax: the reward of the greedy response is subtracted first.
- kl/trl_abs: the absolute value of k1, which estimates nothing.

What passes though public code means something else by a name:

- IPO: dpo/ipo takes summed log-ratios; TRL averages them, which is the same function of another h.
- Label smoothing: TRL's sigmoid loss ignores it; here it is the conservative loss (dpo/cdpo).
- trl_dpo/sft: the mean over tokens of the chosen side, `nll_sum` over their number.
- cpo/*: TRL's CPO is DPO or IPO of mean log-probs without a reference; simpo_gamma has no effect.
- rm/kwise_beta0.0 averages per prompt first, rm/kwise_flat_pairs over all pairs: `kwise_loss`, and
  `bradley_terry_loss` of the pairs of a ranking.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_cli.data.batches import Batch, collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Preference, Ranking, Reply, pairs_of, reply_text
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.decoder import hidden_states, unembed
from rlhf_cli.models.dropout import disable_dropout
from rlhf_cli.models.forward import response_scores, token_logprobs
from rlhf_cli.objectives.advantages import (
    at_last,
    gae,
    group_advantages,
    group_centred,
    kl_shaped_rewards,
    last_index,
    leave_one_out,
    process_advantages,
    returns_to_go,
    soft_overlong,
)
from rlhf_cli.objectives.estimates import clustered_mean
from rlhf_cli.objectives.kl import full_kl, k1, k2, k3, weighted_k3, ziegler_kl_coef
from rlhf_cli.objectives.likelihood import masked_mean, masked_whiten, nll_sum, sequence_logprob
from rlhf_cli.objectives.moments import RunningMoments
from rlhf_cli.objectives.policy_gradient import (
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    policy_gradient_loss,
    sequence_log_ratio,
    token_weights,
)
from rlhf_cli.objectives.preference import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    log1mexp,
    log_odds,
    odds_ratio_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf_cli.objectives.reward_model import (
    bradley_terry_loss,
    centring_penalty,
    kwise_loss,
    plackett_luce_loss,
)
from rlhf_cli.online.written import WrittenWeights
from rlhf_cli.rollout.beam import beam_search
from rlhf_cli.rollout.decode import decode
from rlhf_cli.rollout.sampling import Chooser, Sampling, seen_in
from rlhf_cli.training.loss_term import LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.toys import GivenLogits, bigram, characters, composed, data_of, grid_of, hardware_of

HERE = Path(__file__).parent
FILE = json.loads((HERE / "vectors.json").read_text())
CASES = {case["id"]: case for case in FILE["cases"]}
ANALYTIC = {case["id"]: case for case in FILE["analytic"]}

Compared = Iterator[tuple[str, Any, Any]]
"""Name, ours, expected."""


class Case:
    """A case whose tensors are read by name: floats as float64, masks as bool."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.raw = CASES[id]
        self.params: dict[str, Any] = self.raw["params"]
        self.out: dict[str, Any] = self.raw["outputs"]
        self.grads: dict[str, Any] = self.raw.get("grads", {})

    def read(self, name: str, grad: bool = False) -> Tensor:
        """One input."""
        tensor = torch.tensor(self.raw["inputs"][name])
        if name.endswith("mask"):
            return tensor.bool()
        if tensor.is_floating_point() or tensor.numel() == 0:
            tensor = torch.tensor(self.raw["inputs"][name], dtype=torch.float64)
        return tensor.requires_grad_(grad)

    def all(self, *names: str, grad: str = "") -> list[Tensor]:
        """Several inputs; those that begin with `grad` collect a gradient."""
        return [self.read(name, bool(grad) and name.startswith(grad)) for name in names]


def matches(case: Case, ours: Any, expected: Any, what: str, single: bool = False) -> None:
    """Compare within the case's tolerance."""
    tol = case.raw["tol"]
    if single:
        tol = max(tol, min(tol * 1e4, 1e-4))
    torch.testing.assert_close(
        figures(ours), figures(numbers(expected)), rtol=tol, atol=tol, msg=lambda m: f"{what}: {m}"
    )


def figures(value: Any) -> Tensor:
    """As float64."""
    return torch.as_tensor(value, dtype=torch.float64)


def numbers(value: Any) -> Any:
    """Infinities are written as text."""
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) else value


def labelled(labels: Tensor) -> Batch:
    """Labels with -100 as a batch; the first token is never predicted."""
    response = labels != -100
    response[:, 0] = False
    return grid_of(labels.clamp(min=0), torch.ones_like(response), response)


# --------------------------------------------------------------------------- preferences


PAIRWISE: dict[str, Callable[..., Tensor]] = {
    "sigmoid": dpo_loss,
    "cdpo": dpo_loss,
    "robust": robust_dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
}


def pairwise(case: Case, h: Tensor) -> Tensor:
    """The loss in the case's name."""
    name = case.id.split("/")[1].removeprefix("dpo_").split("_")[0]  # trace/dpo_hinge
    smoothing = case.params.get("label_smoothing", 0.0)
    return PAIRWISE[name](h, case.params["beta"], *([smoothing] if smoothing else []))


def dpo(case: Case) -> Compared:
    chosen, rejected, before_chosen, before_rejected = case.all(
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
        grad="policy",
    )
    better, worse = chosen - before_chosen, rejected - before_rejected
    losses = pairwise(case, better - worse)
    losses.mean().backward()
    yield "losses", losses, case.out["losses"]
    if "chosen_rewards" in case.out:
        yield "chosen", case.params["beta"] * better, case.out["chosen_rewards"]
        yield "rejected", case.params["beta"] * worse, case.out["rejected_rewards"]
    yield "d chosen", chosen.grad, case.grads["d_mean_loss_d_policy_chosen"]
    yield "d rejected", rejected.grad, case.grads["d_mean_loss_d_policy_rejected"]


def dpo_from_logits(case: Case) -> Compared:
    ids, attention, response = case.all("input_ids", "attention_mask", "completion_mask")
    batch = grid_of(ids, attention, response)
    policy = GivenLogits(case.read("policy_logits"))
    reference = GivenLogits(case.read("reference_logits"))
    ours, theirs = (token_logprobs(model, batch, chunk=3).logprobs for model in (policy, reference))
    better, worse = sequence_logprob(ours - theirs, response).chunk(2)
    if case.params["loss_type"] == "sft":
        kept = response.chunk(2)[0]
        loss = nll_sum(ours.chunk(2)[0], kept) / kept.sum()
    else:
        loss = pairwise(case, better - worse).mean()
    loss.backward()
    beta, metrics = case.params["beta"], case.out["metrics"]
    yield "loss", loss, case.out["loss"]
    yield "d logits", policy.logits.grad, case.grads["d_loss_d_policy_logits"]
    yield "chosen", beta * better.mean(), metrics["rewards/chosen"]
    yield "rejected", beta * worse.mean(), metrics["rewards/rejected"]


def kto(case: Case) -> Compared:
    policy, reference, mismatched, before = case.all(
        "policy_logps", "reference_logps", "policy_KL_logps", "reference_KL_logps", grad="policy"
    )
    weights = case.params["desirable_weight"], case.params["undesirable_weight"]
    z0 = kto_baseline(mismatched - before)
    rho, desirable = policy - reference, case.read("labels_desirable")
    loss = kto_loss(rho, desirable, z0, case.params["beta"], *weights).mean()
    loss.backward()
    yield "loss", loss, case.out["loss"]
    yield "z0", z0, case.out["kl"]
    assert mismatched.grad is None
    if case.grads:
        yield "d policy", policy.grad, case.grads["d_loss_d_policy_logps"]


def orpo(case: Case) -> Compared:
    if case.id == "orpo/log1mexp":
        yield "log(1 - e^x)", log1mexp(case.read("x")), case.out["y"]
        return
    weight = case.params["lam"]
    chosen, rejected = case.all("avg_logp_chosen", "avg_logp_rejected", grad="avg")
    losses = odds_ratio_loss(chosen, rejected)
    total = case.raw["inputs"]["nll_chosen"] + weight * losses.mean()
    total.backward()
    ratio = log_odds(chosen) - log_odds(rejected)
    yield "losses", -weight * losses, case.out["beta_times_logsigmoid"]
    yield "log odds", ratio.mean(), case.out["mean_log_odds"]
    yield "total", total, case.out["total_loss"]
    yield "d chosen", chosen.grad, case.grads["d_total_d_chosen"]
    yield "d rejected", rejected.grad, case.grads["d_total_d_rejected"]


def simpo(case: Case) -> Compared:
    chosen, rejected = case.all("avg_logp_chosen", "avg_logp_rejected", grad="avg")
    beta = case.params["beta"]
    if case.id.startswith("cpo/"):
        losses = pairwise(case, chosen - rejected)
    else:
        losses = simpo_loss(chosen, rejected, beta, case.params["gamma"])
    losses.mean().backward()
    yield "losses", losses, case.out["losses"]
    yield "chosen", beta * chosen, case.out["chosen_rewards"]
    yield "rejected", beta * rejected, case.out["rejected_rewards"]
    if case.grads:
        yield "d chosen", chosen.grad, case.grads["d_mean_loss_d_chosen"]
        yield "d rejected", rejected.grad, case.grads["d_mean_loss_d_rejected"]


def reward_model(case: Case) -> Compared:
    chosen, rejected = case.all("rewards_chosen", "rewards_rejected", grad="rewards")
    centring = case.params["center_rewards_coefficient"] or 0.0
    losses = bradley_terry_loss(chosen, rejected) + centring * centring_penalty(chosen, rejected)
    losses.mean().backward()
    yield "loss", losses.mean(), case.out["loss"]
    yield "d chosen", chosen.grad, case.grads["d_loss_d_chosen"]
    yield "d rejected", rejected.grad, case.grads["d_loss_d_rejected"]


def reward_model_kwise(case: Case) -> Compared:
    values, bounds = case.read("rewards_best_first", grad=True), case.raw["inputs"]["cu_lengths"]
    if case.id == "rm/kwise_flat_pairs":
        pairs: list[Preference] = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            names: list[Reply] = [str(i) for i in range(start, end)]
            pairs += pairs_of(Ranking("", names, [float(i) for i in range(len(names))]))
        better = values[[int(reply_text(pair.chosen)) for pair in pairs]]
        worse = values[[int(reply_text(pair.rejected)) for pair in pairs]]
        yield "loss", bradley_terry_loss(better, worse).mean(), case.out["loss"]
        return
    prompts = [values[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    scores = pad_sequence(prompts, batch_first=True)
    ranks = torch.arange(scores.shape[1]).expand_as(scores)
    mask = ranks < torch.tensor([len(prompt) for prompt in prompts])[:, None]
    losses = kwise_loss(scores, ranks, mask)
    losses.mean().backward()
    yield "losses", losses, case.out["per_prompt_loss"]
    yield "loss", losses.mean(), case.out["loss"]
    yield "d scores", values.grad, case.grads["d_loss_d_rewards"]


def plackett_luce(case: Case) -> Compared:
    scores = case.read("scores_best_first", grad=True)
    ranks = torch.arange(scores.shape[1]).expand_as(scores)
    loss = plackett_luce_loss(scores, ranks, torch.ones_like(scores, dtype=torch.bool)).mean()
    loss.backward()
    yield "loss", loss, case.out["mean_nll"]
    yield "d scores", scores.grad, case.grads["d_loss_d_scores"]


# --------------------------------------------------------------------------- policy gradients


def whiten(case: Case) -> Compared:
    values = case.read("values")
    mask = case.read("mask") if "mask" in case.raw["inputs"] else values == values
    mean = masked_mean(values, mask)
    yield "mean", mean, case.out.get("mean", mean)
    variance = masked_mean((values - mean) ** 2, mask)
    if "var_biased" in case.out:
        yield "variance", variance, case.out["var_biased"]
        ours, theirs = variance + 1e-8, case.out["var_unbiased"] + 1e-8
        scale = (ours / theirs) ** 0.5
    else:  # this eps is added to the deviation
        scale = (variance + 1e-8) ** 0.5 / (variance**0.5 + case.params["epsilon"])
    whitened = masked_whiten(values, mask) * scale
    yield "whitened", whitened, figures(case.out["whitened"]) * mask
    kept = masked_whiten(values, mask, shift_mean=False)
    yield (
        "mean kept",
        (kept - mean * mask) * scale + mean * mask,
        figures(case.out["whitened_keep_mean"]) * mask,
    )


def unbiased(values: Tensor, mask: Tensor) -> Tensor:
    """Whitened with the variance of ddof 1, which some public code takes."""
    count = mask.sum()
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    theirs = variance * count / (count - 1)
    return masked_whiten(values, mask) * ((variance + 1e-8) / (theirs + 1e-8)) ** 0.5


def advantages(case: Case) -> Compared:
    if "dones" in case.raw["inputs"]:
        yield from episodes(case)
        return
    rewards, values, mask = case.all("rewards", "values", "mask")
    ours, returns = gae(rewards, values, mask, case.params["gamma"], case.params["lam"])
    yield "advantages", ours, figures(case.out["advantages_raw"]) * mask
    yield "returns", returns, figures(case.out["returns"]) * mask
    yield "whitened", unbiased(ours, mask), figures(case.out["advantages_whitened"]) * mask


def episodes(case: Case) -> Compared:
    """Each is a row; what would follow the last, cut one is added to its last reward."""
    rewards, values, dones = (
        column.squeeze(-1) for column in case.all("rewards", "values", "dones")
    )
    rewards[-1] += case.params["gamma"] * case.raw["inputs"]["next_value"]
    counts = torch.cumsum(dones, 0).long().bincount().tolist()
    gained, worth = (
        pad_sequence(list(each.split(counts)), batch_first=True) for each in (rewards, values)
    )
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    found = gae(gained, worth, mask, case.params["gamma"], case.params["lam"])
    for name, ours in zip(("advantages", "returns"), found, strict=True):
        yield name, ours[mask], [entry for (entry,) in case.out[name]]


def ppo_rollout(case: Case) -> Compared:
    """There the score, and a value, stand one token after the EOS where there is room."""
    responses, logprobs, reference, values = case.all(
        "responses", "logprobs", "ref_logprobs", "values"
    )
    ended = responses == case.params["eos"]
    before = ended.cumsum(-1) - ended.long()  # number of EOS before each token
    mask = before == 0
    longer = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], -1)
    if "padding_mask" in case.out:
        yield "mask", ~mask, case.out["padding_mask"]
        yield "mask of values", ~longer, case.out["padding_mask_p1"]
        yield "last", last_index(longer), case.out["score_index"]
    name = "scores_after_eos_trick" if "score_index" in case.out else "scores_after_penalty"
    grid = at_last(figures(case.out[name]), longer)
    kls = k1(logprobs, reference) * mask
    rewards = kl_shaped_rewards(grid, kls, torch.zeros_like(kls), longer, case.params["kl_coef"])
    ours, returns = gae(rewards, values, longer, case.params["gamma"], case.params["lam"])
    yield "rewards", rewards, case.out["rewards"]
    yield "returns", returns, case.out["returns"]
    whitened = masked_whiten(ours, mask) if "score_index" in case.out else unbiased(ours, mask)
    yield "advantages", whitened, case.out["advantages"]
    if "kl" in case.out:
        yield "KL", kls, case.out["kl"]


def ppo_loss(case: Case) -> Compared:
    if "rows" in case.out:
        yield from clip_table(case)
        return
    names = ("new_logprobs", "old_logprobs", "advantages")
    new, old, gains = case.all(*names, grad="new")
    one = "mask" in case.raw["inputs"]
    mask, value_mask = case.all(*(("mask", "mask") if one else ("policy_mask", "value_mask")))
    sequences = case.params.get("policy_loss_type") == "gspo"
    log_ratio = sequence_log_ratio(new, old, mask) if sequences else new - old
    losses = clipped_policy_loss(
        log_ratio,
        gains,
        case.params.get("cliprange") or case.params["clip_eps_low"],
        case.params.get("clip_eps_high"),
        case.params.get("clip_ratio_c"),
    )
    by_row = sequences or case.params.get("loss_agg_mode") == "seq-mean-token-mean"
    policy = averaged(losses, mask, "response_mean" if by_row else "token_mean")
    policy.backward()
    assert new.grad is not None
    yield "policy", policy, case.out.get("pg_loss", case.out.get("loss"))
    gradient = next(value for name, value in case.grads.items() if name.endswith("new_logprobs"))
    if sequences:  # advantages differ by token there, and each reaches all tokens of its response
        yield "d logprobs", new.grad.sum(-1), figures(gradient).sum(-1)
    else:
        yield "d logprobs", new.grad, gradient
    if "new_values" not in case.raw["inputs"]:
        return
    values, before, returns = case.all("new_values", "old_values", "returns", grad="new")
    loss = clipped_value_loss(values, before, returns, case.params["cliprange_value"])
    value = masked_mean(loss, value_mask)
    total = policy.detach() + case.params["vf_coef"] * value
    total.backward()
    yield "value", value, case.out["vf_loss"]
    yield "total", total, case.out["total" if "total" in case.out else "loss"]
    gradient = next(value for name, value in case.grads.items() if name.endswith("new_values"))
    yield "d values", values.grad, gradient


def clip_table(case: Case) -> Compared:
    for advantage, ratio, loss, gradient in case.out["rows"]:
        new = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
        gain = torch.tensor([[advantage]], dtype=torch.float64)
        ours = clipped_policy_loss(new, gain, case.params["eps"]).sum()
        ours.backward()
        yield f"loss at {advantage}, {ratio}", ours, loss
        if abs(abs(ratio - 1) - case.params["eps"]) > 1e-9:  # on the edge any choice is right
            assert new.grad is not None
            yield f"gradient at {advantage}, {ratio}", new.grad.sum(), gradient


def averaged(
    losses: Tensor, mask: Tensor, how: str, longest: int = 1, count: float | None = None
) -> Tensor:
    """Weighted sum over `count`, or over the responses, or over the tokens for token_mean."""
    weighted = (losses * token_weights(mask.double(), how, longest)).sum()
    return weighted / (count or (mask.sum() if how == "token_mean" else len(mask)))


def value_loss(case: Case) -> Compared:
    values, old, returns, mask = case.all("new_values", "old_values", "returns", "mask", grad="new")
    losses = clipped_value_loss(values, old, returns, case.params["clip_eps"])
    how = "token_mean" if case.params["token_level_loss"] else "response_mean"
    loss = averaged(losses, mask, how)
    loss.backward()
    yield "loss", loss, case.out["loss"]
    yield "d values", values.grad, case.grads["d_loss_d_new_values"]


def loss_aggregation(case: Case) -> Compared:
    values, mask = case.all("loss_matrix", "mask")
    by_token, by_row = averaged(values, mask, "token_mean"), averaged(values, mask, "response_mean")
    if "mode" in case.params:
        ours = by_token if case.params["mode"] == "token-mean" else by_row
        yield "loss", ours, case.out["loss"]
        return
    yield "tokens", by_token, case.out["token_mean"]
    yield "rows", by_row, case.out["seq_mean"]
    every = averaged(values, mask, "token_mean", count=40)
    yield "tokens of all devices", every, case.out["token_mean_global40"]
    every = averaged(values, mask, "response_mean", count=8)
    yield "rows of all devices", every, case.out["seq_mean_global8"]


def group_advantage(case: Case) -> Compared:
    inputs, params = case.raw["inputs"], case.params
    rewards = case.read("rewards")
    if "mask" in inputs:  # per token, from returns
        mask, baseline = case.read("mask"), figures(inputs.get("greedy_baseline", 0.0))
        returns = returns_to_go(at_last(rewards, mask), mask, 1.0)
        yield "returns", returns, case.out["returns"]
        gained = returns_to_go(at_last(rewards - baseline, mask), mask, 1.0)
        ours = gained if "greedy_baseline" in inputs else unbiased(returns, mask)
        yield "advantages", ours, case.out["advantages"]
        return
    if "reward_clip_range" in params:
        rewards = rewards.clamp(*params["reward_clip_range"])
    if params.get("beta"):
        policy, reference = case.all("policy_logprobs", "reference_logprobs")
        mask = torch.tensor(case.out["completion_mask"]).bool()
        rewards = rewards - params["beta"] * sequence_logprob(k1(policy, reference), mask)
    groups = rewards.view(-1, inputs["group_size"])
    if "rloo" in case.id:
        ours = leave_one_out(groups)
    elif params.get("scale_rewards") == "none":
        ours = group_centred(groups)
    else:
        ours = group_advantages(groups, params["epsilon"])
    yield "advantages", ours.flatten(), case.out["advantages"]


AGGREGATION = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "response_mean",
    "grpo": "response_mean",
    "luspo": "response_sum",
    "dr_grpo": "max_tokens",
    "dapo": "token_mean",
    "cispo": "token_mean",
}


def grpo_loss(case: Case) -> Compared:
    new, old, mask = case.all("new_logprobs", "old_logprobs", "mask", grad="new")
    gains, params = case.read("sequence_advantages")[:, None], case.params
    trl = "loss_type" in params
    low, high = (params[f"epsilon_{side}" if trl else f"clip_{side}"] for side in ("low", "high"))
    if "cispo" in case.id:  # TRL's epsilon_high is the largest weight itself, and none is too small
        losses = cispo_loss(new, old, gains, *((None, high - 1) if trl else (low, high)))
    elif "gpg" in case.id:
        losses = policy_gradient_loss(new, gains)
    else:
        sequences = params.get("level") == "sequence" or "gspo" in case.id
        log_ratio = sequence_log_ratio(new, old, mask) if sequences else new - old
        losses = clipped_policy_loss(log_ratio, gains, low, high)
    if "beta" in params:
        losses = losses + params["beta"] * weighted_k3(new, old, case.read("ref_logprobs"))
    how = AGGREGATION[params["loss_type" if trl else "agg"]]
    # what TRL divides by: the responses or tokens of all micro-batches of an optimizer step
    micro = params.get("gradient_accumulation_steps", 1)
    share = micro / params.get("steps_per_generation", micro)
    tokens = params.get("num_items_in_batch", int(mask.sum())) * share
    count = tokens if how == "token_mean" else len(mask) * micro
    loss = averaged(losses, mask, how, params.get("max_completion_length", 1), count)
    loss.backward()
    # an entropy bonus there is a mean over all tokens; it has no gradient through the log-probs
    bonus = (
        params["entropy_coef"] * case.out["metrics"]["entropy"] if "entropy_coef" in params else 0
    )
    yield "loss", loss - bonus, case.out["loss"]
    yield "d logprobs", new.grad, case.grads["d_loss_d_new_logprobs"]


def rloo_loss(case: Case) -> Compared:
    new, old, mask, gains = case.all(
        "new_logprobs", "old_logprobs", "mask", "sequence_advantages", grad="new"
    )
    log_ratio = sequence_logprob(new - old, mask)  # of whole responses, (B,)
    loss = clipped_policy_loss(log_ratio, gains, case.params["epsilon"]).mean()
    loss.backward()
    yield "loss", loss, case.out["loss"]
    yield "d logprobs", new.grad, case.grads["d_loss_d_new_logprobs"]


def kl(case: Case) -> Compared:
    if case.id == "kl/trl_full":
        ours, theirs = case.all("logprobs_full", "ref_logprobs_full")
        found = full_kl(ours.flatten(0, 1), theirs.flatten(0, 1))
        yield "value", found.view(ours.shape[:2]), case.out["value"]
        return
    new, reference = case.all("logprob", "ref_logprob", grad="logprob")
    if case.id == "kl/trl_abs":
        yield "value", k1(new, reference).abs(), case.out["value"]
        return
    ours = {"kl/k1": k1, "kl/k3": k3}[case.id](new, reference)
    ours.sum().backward()
    yield "value", ours, case.out["value"]
    yield "d logprobs", new.grad, case.grads["d_sum_d_logprob"]
    again = new.detach().requires_grad_()
    for right in (k2(again, reference), weighted_k3(again, again.detach(), reference)):
        again.grad = None
        right.sum().backward()
        yield "the right gradient", again.grad, case.grads["unbiased_reverse_kl_grad"]


def reward_shaping(case: Case) -> Compared:
    scores, new, reference, mask = case.all("scores", "logprobs", "ref_logprobs", "mask")
    grid, coef = at_last(scores, mask), case.params["kl_coef"]
    ours = kl_shaped_rewards(grid, new, reference, mask, coef)
    yield "rewards", ours, case.out["masked_rewards"]
    alone = kl_shaped_rewards(torch.zeros_like(grid), new, reference, mask, coef)
    yield "without scores", alone, figures(case.out["non_score_rewards"]) * mask


def kl_controller(case: Case) -> Compared:
    coef, trace = case.params["init"], []
    for value in case.raw["inputs"]["observed_kl"]:
        steps = case.raw["inputs"]["n_steps"]
        coef = ziegler_kl_coef(coef, value, case.params["target"], steps, case.params["horizon"])
        trace.append(coef)
    yield "trace", trace, case.out["coef_after"]


def reward_scaling(case: Case) -> Compared:
    moments = RunningMoments()
    for batch, expected in zip(case.raw["inputs"]["batches"], case.out["trace"], strict=True):
        values, alone = figures(batch), RunningMoments()
        moments.update(values)
        alone.update(values)
        yield "batch", [alone.mean, alone.std], [expected["batch_mean"], expected["batch_std"]]
        yield "all", [moments.std, moments.count], [expected["std"], expected["count"]]
    yield "mean", moments.mean, expected["mean"]  # recorded at the end only


def verifiable_reward(case: Case) -> Compared:
    longest, soft = case.params["max_completion_len"], case.params["soft_punish_cache"]
    yield (
        "penalty",
        soft_overlong(case.read("lengths").double(), longest, soft),
        case.out["rewards"],
    )


# --------------------------------------------------------------------------- numerics and data


def entropy(case: Case) -> Compared:
    logits, mask = case.all("logits", "mask")
    ours = shifted(logits, torch.zeros(mask.shape, dtype=torch.long), 1.0)[1]
    yield "entropy", ours, case.out["token_entropy"]
    yield "mean", masked_mean(ours, mask), case.out["masked_mean_entropy"]


def shifted(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies where logits[t] score ids[t]."""
    first = torch.zeros_like(ids[:, :1])
    every = torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool)
    response = every.clone()
    response[:, 0] = False
    batch = grid_of(torch.cat([first, ids], -1), every, response)
    logits = torch.cat([logits, logits[:, -1:]], 1)
    scored = token_logprobs(
        GivenLogits(logits), batch, chunk=4, temperature=temperature, with_entropy=True
    )
    assert scored.entropy is not None
    return scored.logprobs[:, 1:], scored.entropy[:, 1:]


def sequence_logprobs(case: Case) -> Compared:
    if "token_ids" in case.raw["inputs"]:
        logits, ids = case.all("logits", "token_ids")
        logprobs, entropies = shifted(logits, ids, case.params.get("temperature", 1.0))
        yield "log-probs", logprobs, case.out["logprobs"]
        yield "entropy", entropies, case.out["entropy"]
        return
    model = GivenLogits(case.read("logits"))
    batch = labelled(case.read("labels"))
    sums = sequence_logprob(token_logprobs(model, batch, chunk=4).logprobs, batch.response)
    yield "sum", sums, case.out["sum"]


def sft_loss(case: Case) -> Compared:
    model = GivenLogits(case.read("logits"))
    batch = labelled(case.read("labels"))
    loss = nll_sum(token_logprobs(model, batch, chunk=4).logprobs, batch.response)
    (loss / batch.response.sum()).backward()
    yield "loss", loss / batch.response.sum(), case.out["loss"]
    yield "over 37", loss / 37, case.out["loss_sum_over_37"]
    yield "d logits", model.logits.grad, case.grads["d_loss_d_logits"]


def masks(case: Case) -> Compared:
    if case.id == "masks/truncate_at_eos":
        mask = ~torch.tensor(case.out["pad_mask"]).bool()
        yield "last token", last_index(mask), case.out["last_token_index"]
        return
    ids = case.read("query_responses")
    attention = torch.tensor(case.out["attention_mask"]).bool()
    rows = zip(ids, attention, strict=True)
    batch = collate([Tokens([], row[real].tolist()) for row, real in rows])
    expected = torch.tensor(case.out["position_ids"])[attention]
    yield "positions", batch.positions[batch.attention], expected


def labels_truncation(case: Case) -> Compared:
    if "examples" in case.raw["inputs"]:
        sides = [
            Tokens(example["prompt_ids"], example[side])
            for side in ("chosen_ids", "rejected_ids")
            for example in case.raw["inputs"]["examples"]
        ]
        batch = collate(sides)
    else:
        longest = len(case.out["prompt_input_ids"])
        data = data_of(max_prompt_tokens=longest, long_prompts="cut", max_response_tokens=20)
        inputs = case.raw["inputs"]
        row = Preference(inputs["prompt"], inputs["chosen"], inputs["rejected"])
        sides = Encoder(characters(), data).answers([row])[0].sequences
        for side, tokens in zip(("chosen", "rejected"), sides, strict=True):
            ids, labels = case.out[f"{side}_input_ids"], case.out[f"{side}_labels"]
            yield side, tokens.prompt + tokens.response, ids
            yield f"{side} labels", [-100] * len(tokens.prompt) + tokens.response, labels
        return
    yield "ids", batch.ids, case.out["input_ids"]
    yield "attention", batch.attention, case.out["attention_mask"]
    yield "response", batch.response, case.out["completion_mask"]


def lr_schedule(case: Case) -> Compared:
    kind, _, rest = case.id.removeprefix("lr/").partition("_")
    config = replace(
        composed("dpo").algo,
        lr=case.raw["inputs"]["peak_lr"],
        lr_schedule=kind,
        min_lr_ratio=0.1 if rest == "to_10pct" else 0.0,
        warmup_steps=5 if rest == "warm5" else 0,
    )
    layer = nn.Linear(1, 1)
    optimizer = Optimizer(
        {"x": (layer, config.lr)}, config, case.raw["inputs"]["total_steps"], hardware_of()
    )
    part = LossTerm([torch.ones(1, 1)], lambda x: (layer(x).sum(), {}), 1)
    rates = [optimizer.step([part])["lr"] for _ in case.out["lr_at_step"]]
    yield "rates", rates, case.out["lr_at_step"]


# --------------------------------------------------------------------------- decoding


OPTIONS: dict[str, tuple[Sampling, int, list[int]]] = {
    "decode/TemperatureLogitsWarper_temperature0.7": (Sampling(9, temperature=0.7), 2, []),
    "decode/TopPLogitsWarper_top_p0.8": (Sampling(9, top_p=0.8), 2, []),
    "decode/MinPLogitsWarper_min_p0.2": (Sampling(9, min_p=0.2), 2, []),
    "decode/MinNewTokensLengthLogitsProcessor_prompt_length2_min_new_tokens4_eos9": (
        Sampling(9, min_tokens=4),
        2,
        [9],
    ),
    "decode/pipeline_rep1.2_T0.7_k5_p0.9": (
        Sampling(9, 0.7, top_k=5, top_p=0.9, repetition_penalty=1.2),
        2,
        [],
    ),
}


def decoding(case: Case) -> Compared:
    sampling, generated, stop_ids = OPTIONS[case.id]
    seen, scores = case.all("input_ids", "scores")
    chooser = Chooser(sampling, stop_ids, scores.device)
    made = torch.full((len(scores),), generated)
    marks = seen_in(seen, scores.shape[-1])
    allowed = chooser.allowed(scores / sampling.scored_at, made, marks)
    weights = chooser.weights(allowed)
    yield "probabilities", weights / weights.sum(-1, keepdim=True), case.out["probs"]
    if "scores" in case.out:
        yield "scores", allowed.masked_fill(weights == 0, -torch.inf), case.out["scores"]


def greedy(model: nn.Module, prompts: list[list[int]], sampling: Sampling, eos: int) -> list[Any]:
    """Greedy responses with the prompts before them."""
    noise = torch.zeros(len(prompts), sampling.max_tokens)
    found = decode(model, prompts, noise, sampling, [eos], lambda ids: "")
    return [prompt + each.ids for prompt, each in zip(prompts, found, strict=True)]


def padded(found: list[list[int]], like: list[list[int]], pad: int) -> list[list[int]]:
    """The sequences, filled up on the right to the recorded length."""
    return [ids + [pad] * (len(row) - len(ids)) for ids, row in zip(found, like, strict=True)]


def decoding_beam(case: Case) -> Compared:
    params, prompts = case.params, case.raw["inputs"]["prompts"]
    model = bigram(torch.tensor(case.raw["inputs"]["bigram_logits"]))
    if "num_beams" not in params:
        penalty = params.get("repetition_penalty", 1.0)
        sampling = Sampling(params["max_new_tokens"], 0.0, repetition_penalty=penalty)
        found = greedy(model, prompts, sampling, params["eos"])
    else:
        algo = replace(
            composed("generate").algo,
            beams=params["num_beams"],
            samples=1,
            max_tokens=params["max_new_tokens"],
            min_tokens=params.get("min_new_tokens", 0),
            length_penalty=params.get("length_penalty", 1.0),
        )
        best = [
            beam_search(model, prompt, Sampling.of(algo), algo.samples, [params["eos"]], 64)[0]
            for prompt in prompts
        ]
        found = [prompt + each.ids for prompt, each in zip(prompts, best, strict=True)]
        scores = [sum(each.logprobs) / len(each.ids) ** algo.length_penalty for each in best]
        yield "scores", scores, case.out["sequences_scores"]
    # a closed hypothesis is filled with pads there, or with EOS where a longer one ended
    ends = [row.index(params["eos"]) + 1 if params["eos"] in row else None for row in found]
    for i, end in enumerate(ends):
        yield f"sequence {i}", found[i], case.out["sequences"][i][:end]


# --------------------------------------------------------------------------- a whole model


def tiny_llama() -> Any:
    """The checkpoint beside the figures."""
    return AutoModelForCausalLM.from_pretrained(HERE / "tiny_llama", dtype=torch.float32).eval()


def model_forward(case: Case) -> Compared:
    model = tiny_llama()
    ids, attention = case.all("input_ids", "attention_mask")
    batch = grid_of(ids, attention, attention)
    hidden = hidden_states(model, batch)
    yield "logits", unembed(model, hidden) * attention[..., None], case.out["logits"]
    yield "hidden", hidden[1], case.out["last_hidden_row1"]

    labels = case.read("sft_labels_for_row_1")
    row = grid_of(ids[1:], attention[1:], labels != -100)
    loss = nll_sum(token_logprobs(model, row, chunk=2).logprobs, row.response) / 4
    loss.backward()
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    yield "loss", loss, case.out["sft_loss_row1"]
    yield "norm", nn.utils.clip_grad_norm_(weights, float("inf")), case.out["grad_norm_row1"]

    prompts = [ids[0, 2:].tolist(), ids[1].tolist()]
    found = [
        [0, 0, *row] if i == 0 else row
        for i, row in enumerate(greedy(model, prompts, Sampling(8, 0.0), 2))
    ]
    yield "greedy", padded(found, case.out["greedy"], 0), case.out["greedy"]
    algo = replace(
        composed("generate").algo, beams=3, samples=1, max_tokens=8, min_tokens=0, length_penalty=1
    )
    best = [
        prompt + beam_search(model, prompt, Sampling.of(algo), algo.samples, [2], 64)[0].ids
        for prompt in prompts
    ]
    yield "beams", [[0, 0, *best[0]], best[1]], case.out["beam3"]


def training_trace(case: Case) -> Compared:
    """Six steps of plain SGD on four pairs each, as two tools' trainers took them."""
    rows = case.raw["inputs"]["token_ids"]
    pairs = [
        [Tokens(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")]
        for row in rows
    ]
    model = reference = tiny_llama()
    if case.id == "trace/reward":
        model = AutoModelForSequenceClassification.from_pretrained(
            HERE / "tiny_llama", num_labels=1, dtype=torch.float32
        )
        with torch.no_grad():
            model.score.weight.copy_(case.read("score_head_weight"))
    else:
        reference = tiny_llama().requires_grad_(False)
    disable_dropout(model)
    sgd = torch.optim.SGD(model.parameters(), case.params["learning_rate"])
    for step, expected in enumerate(case.out["steps"]):
        picked = [pairs[(4 * step + i) % len(pairs)] for i in range(4)]
        batch = collate([pair[0] for pair in picked] + [pair[1] for pair in picked])
        if case.id == "trace/reward":
            chosen, rejected = response_scores(model, batch).chunk(2)
            loss = bradley_terry_loss(chosen, rejected).mean()
            yield f"margin {step}", (chosen - rejected).mean(), expected["margin"]
        else:
            ours, theirs = (
                sequence_logprob(token_logprobs(each, batch, chunk=5).logprobs, batch.response)
                for each in (model, reference)
            )
            better, worse = (ours - theirs).chunk(2)
            loss, beta = pairwise(case, better - worse).mean(), case.params["beta"]
            yield f"chosen {step}", beta * better.mean(), expected["rewards/chosen"]
            yield f"rejected {step}", beta * worse.mean(), expected["rewards/rejected"]
            yield f"log-probs {step}", ours.chunk(2)[0].mean(), expected["logps/chosen"]
        sgd.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        sgd.step()
        yield f"loss {step}", loss, expected["loss"]
        yield f"norm {step}", norm, expected["grad_norm"]
    weights = torch.cat([weight.flatten() for weight in model.parameters()]).double()
    yield "weights", weights.abs().sum(), case.out["final"]["weight_abs_sum"]
    yield "sum", weights.sum(), case.out["final"]["weight_sum"]


GROUPS: Mapping[str, Callable[[Case], Compared]] = {
    function.__name__: function
    for function in (
        *(dpo, dpo_from_logits, kto, orpo, simpo, reward_model, reward_model_kwise, plackett_luce),
        *(whiten, ppo_rollout, ppo_loss, value_loss, loss_aggregation, group_advantage),
        *(grpo_loss, rloo_loss, kl, reward_shaping, kl_controller, reward_scaling),
        *(
            verifiable_reward,
            masks,
            entropy,
            sequence_logprobs,
            sft_loss,
            labels_truncation,
            lr_schedule,
        ),
        *(decoding, decoding_beam, model_forward, training_trace),
    )
} | {"gae": advantages}
SINGLE = {"dpo_from_logits", "entropy", "sequence_logprobs", "sft_loss", "decoding_beam"}


@pytest.mark.parametrize("id", CASES)
def test_a_case_of_public_code(id: str) -> None:
    case = Case(id)
    group = case.raw["group"]
    compared = list(GROUPS[group](case))
    assert compared
    for what, ours, expected in compared:
        matches(case, ours, expected, what, group in SINGLE)


@pytest.mark.parametrize("id", ["kl_optimal_beta0.1", "kl_optimal_beta1.0"])
def test_the_recorded_optimum_makes_every_shaped_reward_equal(id: str) -> None:
    case = ANALYTIC[id]
    best, reference, reward = (
        torch.tensor(case[name], dtype=torch.float64) for name in ("pi_star", "pi_ref", "reward")
    )
    one = torch.ones(5, 1, dtype=torch.bool)
    logs = best.log()[:, None], reference.log()[:, None]
    shaped = kl_shaped_rewards(at_last(reward, one), *logs, one, case["beta"])
    torch.testing.assert_close(shaped[:, 0], torch.full((5,), case["beta_logZ"]).double())
    torch.testing.assert_close((best * k1(*logs)[:, 0]).sum().item(), case["kl"])


def test_the_recorded_advantages_of_steps() -> None:
    case = ANALYTIC["grpo_process_supervision_ddof1"]
    steps = case["step_end_index_and_reward"]
    rewards = [figures([reward for _, reward in response]) for response in steps]
    ends = [[end for end, _ in response] for response in steps]
    found = process_advantages(rewards, ends, [case["T"]] * 3, normalise=True, eps=0.0)
    expected = figures(case["advantages"])
    torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=1e-12)


def test_the_recorded_estimate_and_its_error() -> None:
    case = ANALYTIC["expected_reward_estimate"]
    found = clustered_mean(torch.tensor(case["rewards"], dtype=torch.float64))
    assert found.mean == pytest.approx(case["mean"], abs=1e-12)
    assert found.stderr == pytest.approx(case["stderr_over_queries"], abs=1e-12)


def test_the_recorded_average_of_weights() -> None:
    case = ANALYTIC["ema_0.992"]
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, case["start"])
    written = WrittenWeights(layer, replace(composed("ppo").algo, ema_decay=0.992), {}, {})
    trace = []
    for weight in case["observations"]:
        nn.init.constant_(layer.weight, weight)
        written.after_update()
        with written.in_place():
            trace.append(layer.weight.item())
    assert trace == pytest.approx(case["ema"], rel=1e-5)
