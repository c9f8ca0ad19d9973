"""Responses that are enumerated, and what is best at all among them: bounds for the frontier.

Token by token the likeliest beginnings are kept, which leads to likely responses with their exact
probabilities. Where these leave nothing out, the optimum is that of the whole space.
Otherwise it is that of the reference as it would be if it gave these alone, and `covered` tells
which share of its probability they hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config.errors import Interrupted, UserError
from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import EncodedPrompt, Tokens
from rlhf_cli.evaluation.bench import Bench
from rlhf_cli.evaluation.frontier import JUDGES
from rlhf_cli.models.decoder import hidden_states, unembed
from rlhf_cli.models.tokenizers import ids_of_no_token
from rlhf_cli.objectives.estimates import clustered_mean
from rlhf_cli.objectives.optimum import best_of_n_probabilities, divergence, optimum
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import Bar
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.policy import Policy

Figures = dict[str, Any]

BEST_OF = (1, 2, 4, 8, 16, 32, 64)
BETAS = [2.0**power for power in range(3, -6, -1)]  # in standard deviations of the reward


@dataclass
class Found:
    """Responses to a prompt, or their beginnings, as ids; logprobs (Y,) are the reference's."""

    ids: list[list[int]]
    logprobs: Tensor

    def at(self, places: Sequence[int]) -> "Found":
        """Some of them."""
        return Found([self.ids[i] for i in places], self.logprobs[list(places)])

    def likeliest(self, most: int) -> "Found":
        """Those that can be at all, best first, as many as there may be."""
        order = self.logprobs.argsort(descending=True, stable=True)[:most]
        return self.at(order[self.logprobs[order] > -torch.inf].tolist())

    def __add__(self, other: "Found") -> "Found":
        return Found(self.ids + other.ids, torch.cat([self.logprobs, other.logprobs]))


@torch.no_grad()
def enumerated(policy: Policy, prompt: Sequence[int], cfg: EvaluateConfig) -> Found:
    """Likely responses to a prompt, algo.enumerate at most: all where there are no more.

    As many beginnings are kept at each token, the likeliest ones. One that reaches max_tokens is a
    whole response, as sampling cuts it. Log-probs are those at the sampling temperature.
    """
    absent = list(ids_of_no_token(policy.model, policy.encoder.tokenizer))
    stops, most = set(policy.stop_ids), cfg.algo.enumerate
    found = Found([[]], torch.zeros(1, dtype=torch.double))
    for length in range(cfg.algo.sampled_tokens):
        goes_on = [not ids or ids[-1] not in stops for ids in found.ids]
        alive = found.at([i for i, each in enumerate(goes_on) if each])
        if not alive.ids:
            break
        found = found.at([i for i, each in enumerate(goes_on) if not each])
        rows = max(1, cfg.hardware.tokens_at_once // (len(prompt) + length + 1))
        rows = min(rows, cfg.hardware.logits_at_once)
        for first in range(0, len(alive.ids), rows):
            some = alive.at(range(first, min(first + rows, len(alive.ids))))
            nexts = _next_logprobs(policy, prompt, some.ids, cfg.algo.temperature)
            nexts[:, absent] = -torch.inf
            found = (found + _grown(some, nexts, most)).likeliest(most)
    return found


def _next_logprobs(
    policy: Policy, prompt: Sequence[int], beginnings: list[list[int]], temperature: float
) -> Tensor:
    """(B, V) in float64, of the token after each of some beginnings of one length."""
    device = next(policy.model.parameters()).device
    batch = collate([Tokens(list(prompt), ids) for ids in beginnings], device)
    states = hidden_states(policy.model, batch)[:, -1]
    return unembed(policy.model, states, temperature).double().log_softmax(-1).cpu()


def _grown(some: Found, nexts: Tensor, most: int) -> Found:
    """The likeliest of all that are longer by a token."""
    whole = (some.logprobs[:, None] + nexts).flatten()
    best = whole.topk(min(most, len(whole)))
    pairs = [divmod(place, nexts.shape[-1]) for place in best.indices.tolist()]
    return Found([[*some.ids[row], token] for row, token in pairs], best.values)


# --------------------------------------------------------------------------- what is best


@dataclass
class Space:
    """The responses to one prompt that reward and gold have scores of.

    logprobs: (Y,) under the reference, as if it gave these responses alone.
    scores: by judge (Y,).
    covered: the probability that it gives one of them.
    """

    logprobs: Tensor
    scores: dict[str, Tensor]
    covered: float

    def under(self, probabilities: Tensor) -> dict[str, float]:
        """The KL of a policy that has these probabilities (Y,), and what it is worth."""
        worth = {
            judge: (probabilities * scores.double()).sum().item()
            for judge, scores in self.scores.items()
        }
        return {"kl": divergence(probabilities, self.logprobs), **worth}


def bounds(bench: Bench, reference: Policy, name: str) -> Figures:
    """The optimum of reward - beta KL over several beta, and the best of n with its true KL.

    Args:
        name: of the reference.

    Raises:
        UserError: no response to some prompt has a score.
        Interrupted: a signal asked for the end.
    """
    spaces = spaces_of(bench, reference, name)
    if any(not len(space.logprobs) for space in spaces):
        raise UserError("algo.enumerate: no response to some prompt has a score")
    rewards = torch.cat([space.scores["reward"] for space in spaces]).double()
    likely = torch.cat([space.logprobs.exp() / len(spaces) for space in spaces])
    spread = (likely * (rewards - (likely * rewards).sum()).square()).sum().sqrt().item() or 1.0
    covered = [space.covered for space in spaces]

    def means(of: Callable[[Space], Tensor]) -> Figures:
        values = [space.under(of(space)) for space in spaces]
        return {
            each: asdict(clustered_mean(torch.tensor([[value[each]] for value in values])))
            for each in values[0]
        }

    def tilted(beta: float) -> Figures:
        return means(lambda space: optimum(space.logprobs, space.scores["reward"], beta))

    def chosen(n: int) -> Figures:
        return means(
            lambda space: best_of_n_probabilities(space.logprobs.exp(), space.scores["reward"], n)
        )

    return {
        "responses": sum(len(space.logprobs) for space in spaces) / len(spaces),
        "covered": sum(covered) / len(covered),
        "covered_least": min(covered),
        "optimum": [{"beta": spread * size, **tilted(spread * size)} for size in BETAS],
        "best_of": {str(n): chosen(n) for n in BEST_OF},
    }


def spaces_of(bench: Bench, reference: Policy, name: str) -> list[Space]:
    """The responses to each prompt, enumerated and judged."""
    prompts: list[EncodedPrompt] = reference.encoder.prompts([row for row, _ in bench.prompts])
    found = all_enumerated(reference, prompts, bench.cfg)
    stops = set(reference.stop_ids)
    rollouts = [
        Rollout(
            row,
            Tokens(prompt, ids, row.source),
            [],
            "eos" if ids[-1] in stops else "length",
            reference.encoder.text(ids),
        )
        for (row, prompt), of_prompt in zip(prompts, found, strict=True)
        for ids in of_prompt.ids
    ]
    own = bench.kept.of(f"{name} enumerated", [], 1)
    said = {
        judge: own.scored(judge, bench.judges[judge], rollouts).total
        for judge in JUDGES
        if judge in bench.judges
    }
    spaces, first = [], 0
    for of_prompt in found:
        last = first + len(of_prompt.ids)
        scores = {judge: total[first:last] for judge, total in said.items()}
        known = ~torch.stack(list(scores.values())).isnan().any(0)
        of_known = {judge: each[known] for judge, each in scores.items()}
        logprobs = of_prompt.logprobs[known]
        spaces.append(Space(logprobs.log_softmax(-1), of_known, logprobs.exp().sum().item()))
        first = last
    return spaces


def all_enumerated(
    policy: Policy, prompts: Sequence[EncodedPrompt], cfg: EvaluateConfig
) -> list[Found]:
    """The responses to each prompt; each rank enumerates those of some."""
    own: list[list[Any]] = []
    with Bar("enumerate", len(prompts)) as bar:
        for place in world().share(len(prompts)):
            found = enumerated(policy, prompts[place][1], cfg)
            own.append([found.ids, found.logprobs.tolist()])
            bar.advance()
            if world().size == 1 and (signal := interrupts.asked()) is not None:
                raise Interrupted(f"{signal}: what was sampled is kept; the same command goes on")
    return [
        Found(ids, torch.tensor(logprobs, dtype=torch.double))
        for of_rank in world().from_all(own)
        for ids, logprobs in of_rank
    ]
