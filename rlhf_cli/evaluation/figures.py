"""The figures of one policy in report.json, from its samples and what judges say of them.

Each is {mean, stderr} or has NAME_stderr beside it, clustered by prompt: responses to one prompt
are not independent of each other. No figure here depends on another policy but the reference.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.data.items import Tokens
from rlhf_cli.evaluation.frontier import JUDGES
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.objectives.estimates import Estimate, clustered_mean, ratio_mean
from rlhf_cli.objectives.kl import k1
from rlhf_cli.objectives.subsets import best_of, best_of_n_kl_bound, majority_at, pass_at
from rlhf_cli.rewards.answers import final_answer, squeezed
from rlhf_cli.rewards.reward import Scores
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.policy import Policy

Figures = dict[str, Any]

COMPARES_ANSWERS = ("exact_answer", "math_answer", "close_answer")
"""Rules that look at the final answer of a response: responses that give the same one agree."""


@dataclass
class Sampled:
    """K responses of a policy to each of N prompts, prompt by prompt, and what judges say of them.

    said: by judge, as `scorers_of` names them.
    """

    rollouts: list[Rollout]
    said: dict[str, Scores]
    samples: int

    def of(self, judge: str) -> Tensor:
        """(N, K) scores, NaN where a response has none."""
        return self.said[judge].total.view(-1, self.samples)

    @property
    def decides(self) -> str:
        """Who decides who wins: gold where there is gold."""
        return "gold" if "gold" in self.said else "reward"

    @property
    def decisive(self) -> Tensor:
        """(N, K) its scores."""
        return self.of(self.decides)

    def by_prompt(self, values: Sequence[float]) -> Tensor:
        """(N, K) of a value of each response."""
        return torch.tensor(values, dtype=torch.double).view(-1, self.samples)


def scorers_of(cfg: EvaluateConfig) -> dict[str, str]:
    """What scores responses, by the name that its figures have: reward, gold, scores/SPEC."""
    named = {"reward": cfg.reward, "gold": cfg.gold}
    others = {f"scores/{spec}": spec for spec in cfg.scorers}
    return {name: spec for name, spec in (named | others).items() if spec is not None}


def figures_of(sampled: Sampled, specs: Mapping[str, str]) -> Figures:
    """What samples alone tell.

    Args:
        specs: what each judge is, as the config names it.
    """
    figures: Figures = {}
    for judge in sampled.said:
        figures |= mean_of_known(judge, sampled.of(judge))
    if best := best_of_samples(sampled):
        figures["best_of"] = best
    for judge, spec in specs.items():
        if judge in sampled.said and is_right_or_wrong(sampled.of(judge)):
            figures |= solved(judge, spec, sampled)
    lengths = sampled.by_prompt([len(each.tokens.response) for each in sampled.rollouts])
    ended = sampled.by_prompt([float(each.ended) for each in sampled.rollouts])
    return {**figures, **with_error("length", lengths), **with_error("ended", ended)}


def with_error(name: str, values: Tensor) -> Figures:
    """A mean as a plain number, its error beside it. Args: values (N, K)."""
    estimate = clustered_mean(values)
    return {name: estimate.mean, f"{name}_stderr": estimate.stderr}


def mean_of_known(judge: str, values: Tensor) -> Figures:
    """The mean over responses that have a reward, and the share of those that have none, if any.

    Args: values (N, K), NaN where there is none.
    """
    per_prompt = values.double().nanmean(-1, keepdim=True)  # (N, 1)
    known = per_prompt[~per_prompt.isnan().squeeze(-1)]
    figures: Figures = {judge: asdict(clustered_mean(known)) if len(known) else None}
    if (share := values.isnan().float().mean().item()) > 0:
        figures[f"{judge}_none"] = share
    return figures


# --------------------------------------------------------------------------- of several samples


def sizes(samples: int) -> list[int]:
    """1, 2, 4 and so on, up to the number of samples: what best of n, pass@n and maj@n are of."""
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return [*powers, samples]


def best_of_samples(sampled: Sampled) -> dict[str, Figures]:
    """By n: each judge's mean of the best of n by `reward`, and the bound of its KL to one sample.

    Over the prompts whose responses all have every score.
    """
    if "reward" not in sampled.said or sampled.samples == 1:
        return {}
    scores = {judge: sampled.of(judge) for judge in JUDGES if judge in sampled.said}
    known = ~torch.stack([each.isnan().any(-1) for each in scores.values()]).any(0)  # (N,)
    if not known.any():
        return {}
    chosen_by = scores["reward"][known]
    return {
        str(n): {
            "kl_bound": best_of_n_kl_bound(n),
            **{
                judge: asdict(clustered_mean(best_of(chosen_by, each[known], n)[:, None]))
                for judge, each in scores.items()
            },
        }
        for n in sizes(sampled.samples)
    }


def is_right_or_wrong(scores: Tensor) -> bool:
    """Whether a judge says 1 or 0 alone, and both or with several samples: a verifier."""
    known = scores[~scores.isnan()]
    return bool(len(known)) and bool(((known == 0) | (known == 1)).all())


def solved(judge: str, spec: str, sampled: Sampled) -> Figures:
    """JUDGE_pass_at and, where it compares final answers, JUDGE_maj_at: estimates by n."""
    scores = sampled.of(judge)
    known = ~scores.isnan().any(-1)
    if not known.any() or sampled.samples == 1:
        return {}
    right = scores[known]
    ns = sizes(sampled.samples)
    passed = {str(n): asdict(clustered_mean(pass_at(right, n)[:, None])) for n in ns}
    figures: Figures = {f"{judge}_pass_at": passed}
    if spec.partition(":")[0] in COMPARES_ANSWERS:
        said = [squeezed(final_answer(each.text)) for each in sampled.rollouts]
        of_prompts = [
            said[place * sampled.samples : (place + 1) * sampled.samples]
            for place in known.nonzero().flatten().tolist()
        ]
        figures[f"{judge}_maj_at"] = {
            str(n): asdict(clustered_mean(majorities(of_prompts, right, n))) for n in ns
        }
    return figures


def majorities(answers: Sequence[Sequence[Hashable]], right: Tensor, n: int) -> Tensor:
    """(N, 1) the chance at each prompt that the majority of n samples is right."""
    chances = [
        majority_at(each, values, n) for each, values in zip(answers, right.tolist(), strict=True)
    ]
    return torch.tensor(chances, dtype=torch.double)[:, None]


# --------------------------------------------------------------------------- with the model


def kls_of_tokens(
    cfg: EvaluateConfig, policy: Policy, reference: Policy, rollouts: Sequence[Rollout]
) -> list[Tensor]:
    """log pi - log ref of each token of each response, both at the sampling temperature."""
    sequences = [rollout.tokens for rollout in rollouts]
    temperature = Sampling.of(cfg.algo).scored_at
    ours = logprobs_of(policy.model, sequences, cfg.hardware, temperature)
    theirs = logprobs_of(reference.model, sequences, cfg.hardware, temperature)
    return [k1(*each) for each in zip(ours, theirs, strict=True)]


def estimated_kl(kls: Sequence[Tensor], samples: int) -> dict[str, float]:
    """KL(policy || reference) per response in nats.

    Args:
        kls: of each response those of its tokens.
    """
    sums = torch.stack([each.sum() for each in kls])
    estimate: Estimate = clustered_mean(sums.view(-1, samples))
    return asdict(estimate)


def entropy_of(rollouts: Sequence[Rollout], samples: int) -> Figures:
    """Nats per token, as -log p of what was sampled has them in the mean."""
    sums = torch.tensor([-sum(each.logprobs) for each in rollouts], dtype=torch.double)
    counts = torch.tensor([len(each.logprobs) for each in rollouts], dtype=torch.double)
    estimate = ratio_mean(sums.view(-1, samples).sum(-1), counts.view(-1, samples).sum(-1))
    return asdict(estimate)


def losses_of(model: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> Tensor:
    """(2, R) of each row the sum of the NLL of its tokens in nats, and their number."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for place, logprobs in enumerate(logprobs_of(model, sequences, hardware)):
        row = sequences[place].source or str(place)
        sums[row] = sums.get(row, 0.0) - logprobs.double().sum().item()
        counts[row] = counts.get(row, 0) + len(logprobs)
    return torch.tensor([list(sums.values()), list(counts.values())], dtype=torch.double)


def mean_loss(name: str, losses: Tensor | None) -> Figures:
    """NLL per token in nats, clustered by row; None without any."""
    if losses is None:
        return {name: None}
    estimate = ratio_mean(losses[0], losses[1])
    return {name: estimate.mean, f"{name}_stderr": estimate.stderr}


def held_out_loss(
    name: str, model: nn.Module, sequences: Sequence[Tokens], hardware: Hardware
) -> dict[str, float]:
    """NLL per token in nats of held-out rows, and NAME_stderr, clustered by row."""
    return mean_loss(name, losses_of(model, sequences, hardware))


def change_of(ours: Tensor, theirs: Tensor) -> Figures:
    """By how much the NLL per token of the same rows is above another policy's, paired by row."""
    return asdict(ratio_mean(ours[0] - theirs[0], ours[1]))
