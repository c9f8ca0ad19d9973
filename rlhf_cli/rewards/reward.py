"""A reward as the stages use it: the weighted sum of models, rules and functions of `reward=`."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.step_cutter import StepCutter
from rlhf_cli.folders.manifest import RESPONSE
from rlhf_cli.ranks.agreement import on_every_rank
from rlhf_cli.ranks.world import world
from rlhf_cli.rewards.base import Cut, Require, RewardSource
from rlhf_cli.rewards.functions import Response, UserFunction
from rlhf_cli.rewards.models import CheckpointReward, load_model_reward
from rlhf_cli.rewards.rules import Rule, rule_of
from rlhf_cli.rewards.specs import check_rows_of, function_of, terms_of
from rlhf_cli.rollout.rollouts import Rollout


class RuleReward(RewardSource):
    """A plain function of row and text.

    Each rank judges some responses: some rules are slow, and some go by a clock, which must decide
    once for all.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule.spec)
        self.rule = rule

    def check(self, rows: Sequence[Prompt], require: Require, role: str) -> None:
        """Every row has the column that the rule reads."""
        check_rows_of(self.spec, rows)

    def score(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(B,) the rule's value for each rollout."""
        own = [rollouts[place] for place in world().share(len(rollouts))]
        judged = on_every_rank(lambda: [self.rule.score(each.row, each.text) for each in own])
        return torch.cat(world().gather([floats(judged)]))


class FunctionReward(RewardSource):
    """A user's function, of responses, or of steps where it names them.

    Of steps, the reward of a response is the mean of those that are known.
    """

    def __init__(self, function: UserFunction, cutter: StepCutter) -> None:
        super().__init__(function.spec)
        self.function = function
        self.cutter = cutter
        if function.signature.judges == "step":
            self.step_end = cutter.step_end

    def check(self, rows: Sequence[Prompt], require: Require, role: str) -> None:
        """Some row has each column that the function cannot do without."""
        check_rows_of(self.spec, rows)

    def score(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(B,) the function's values."""
        if self.step_end is not None:
            return means(self.score_steps(rollouts, cuts_of(self.cutter, rollouts)))
        return floats(self.function.judge([response_of(rollout) for rollout in rollouts]))

    def score_steps(self, rollouts: Sequence[Rollout], cuts: Sequence[Cut]) -> list[Tensor]:
        """(n_i,) the function's values of the steps."""
        judged = self.function.judge(
            [response_of(each, cut.texts) for each, cut in zip(rollouts, cuts, strict=True)]
        )
        pairs = zip(judged, cuts, strict=True)
        return [
            floats(each if isinstance(each, list) else [each] * len(cut.ends))
            for each, cut in pairs
        ]


def response_of(rollout: Rollout, steps: list[str] | None = None) -> Response:
    """A rollout as a user's function sees it."""
    return Response(rollout.row, rollout.text, rollout.tokens.response, steps)


@dataclass
class Scores:
    """What a reward says of B rollouts.

    total: (B,) sum of weight times term over the terms that apply; NaN where none does, and where
        one of them failed: the sum would not mean the same as that of other responses.
    parts: term -> (B,) its own value, without weight; NaN where it does not apply or failed. By
        step, the part of a term that judges steps is the mean of those that it knows.
    seconds: term -> time it took.
    steps: by step only: of each rollout (n_i,) the weighted rewards of its steps, NaN where no term
        knows the step.
    ends: by step only: of each rollout the index in its response ids of each step's last token.
    whole: by step only: (B,) `total` of the terms that judge whole responses; NaN where none does.
    """

    total: Tensor
    parts: dict[str, Tensor]
    seconds: dict[str, float]
    steps: list[Tensor] | None = None
    ends: list[list[int]] | None = None
    whole: Tensor | None = None

    def at(self, places: Sequence[int]) -> "Scores":
        """Of some of the responses alone, whose steps are not told."""
        chosen = list(places)
        parts = {spec: part[chosen] for spec, part in self.parts.items()}
        return Scores(self.total[chosen], parts, self.seconds)


@dataclass
class LoadedTerm:
    """A term that is loaded."""

    weight: float
    source: RewardSource


class Reward:
    """The sum of the terms of `reward=`."""

    def __init__(self, terms: list[LoadedTerm], cutter: StepCutter) -> None:
        """`cutter`: finds the steps of a response where no term judges steps.

        Raises:
            UserError: terms that judge steps cut responses differently.
        """
        self.terms = terms
        judges = [term.source for term in terms if term.source.step_end is not None]
        for source in judges[1:]:
            if source.step_end != judges[0].step_end:
                raise UserError(
                    f"{judges[0].spec} ends steps by {judges[0].step_end!r}, {source.spec} by "
                    f"{source.step_end!r}; rewards of steps must cut a response alike (functions "
                    "by data.step_end, step models as they were trained)"
                )
        own = judges[0].step_end if judges else None
        self.cutter = cutter if own is None else StepCutter(cutter.tokenizer, own)

    @property
    def critic_start(self) -> LoadedTerm | None:
        """The first reward model of whole responses that a critic may start as, if any.

        It reads the policy's vocabulary, and the policy learns to raise it.
        """
        for term in self.terms:
            source = term.source
            if (
                isinstance(source, CheckpointReward)
                and source.aggregation.level == RESPONSE
                and source.shares_vocabulary
                and term.weight > 0
            ):
                return term
        return None

    @property
    def response_model(self) -> CheckpointReward:
        """The first reward model of whole responses that counts; `response_models` tells of any."""
        counted = (term.source for term in self.terms if term.weight)
        models = (source for source in counted if isinstance(source, CheckpointReward))
        return next(model for model in models if model.aggregation.level == RESPONSE)

    def check(self, rows: Sequence[Prompt], require: Require, role: str = "reward") -> None:
        """The rows have what every term reads, and no reward model is as good as a coin."""
        for i, term in enumerate(self.terms):
            term.source.check(rows, require, f"{role}[{i}]" if i else role)

    def score(self, rollouts: Sequence[Rollout], by_step: bool = False) -> Scores:
        """Every term of every rollout, and their weighted sum."""
        parts: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        cuts = cuts_of(self.cutter, rollouts) if by_step else []
        steps = [torch.full((len(cut.ends),), math.nan) for cut in cuts]
        whole = []
        failed = torch.zeros(len(rollouts), dtype=torch.bool)
        for term in self.terms:
            began = time.perf_counter()
            source = term.source
            if by_step and source.step_end is not None:
                judged = source.score_steps(rollouts, cuts)
                part = means(judged)
                if term.weight:
                    steps = [
                        known_sum(torch.stack([so_far, term.weight * values]))
                        for so_far, values in zip(steps, judged, strict=True)
                    ]
            else:
                part = source.score(rollouts)
                whole.append(term)
            if term.weight:
                failed |= part.isinf()
            parts[source.spec] = part.masked_fill(part.isinf(), math.nan)
            seconds[source.spec] = time.perf_counter() - began
        total = weighted_sum(self.terms, parts).masked_fill(failed, math.nan)
        if not by_step:
            return Scores(total, parts, seconds)
        ends = [cut.ends for cut in cuts]
        return Scores(total, parts, seconds, steps, ends, weighted_sum(whole, parts))

    def check_scored(self, key: str, scores: Tensor) -> None:
        """Some response of a run has a reward.

        Args:
            key: that names this reward.
            scores: of all of them, NaN where there is none.

        Raises:
            RunError: none has.
        """
        if scores.numel() and bool(scores.isnan().all()):
            spec = " + ".join(term.source.spec for term in self.terms)
            raise RunError(
                f"none of {scores.numel()} responses got a score from {key}={spec}; see the "
                "messages of functions above, or the columns and forms that rules need"
            )

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Of each term mean and std where any response has it, the share without, and seconds."""
        metrics: dict[str, float] = {}
        for spec, part in scores.parts.items():
            known = part[~part.isnan()]
            if len(known):
                metrics[f"reward/{spec}/mean"] = known.mean().item()
                metrics[f"reward/{spec}/std"] = known.std(correction=0).item()
            metrics[f"reward/{spec}/none"] = 1 - len(known) / len(part)
            metrics[f"seconds/reward/{spec}"] = scores.seconds[spec]
        return metrics


def weighted_sum(terms: Sequence[LoadedTerm], parts: dict[str, Tensor]) -> Tensor:
    """(B,) the weighted sum over the terms that apply; a weight of 0 counts as none."""
    counted = [term.weight * parts[term.source.spec] for term in terms if term.weight]
    unknown = torch.full_like(next(iter(parts.values())), math.nan)
    return known_sum(torch.stack([unknown, *counted]))


def known_sum(values: Tensor) -> Tensor:
    """Sum over the first dimension of what is not NaN; NaN where all is: (K, N) -> (N,)."""
    return values.nansum(0).masked_fill(values.isnan().all(0), math.nan)


def floats(values: Sequence[float | None]) -> Tensor:
    """(N,) with NaN for None."""
    known = [math.nan if value is None else value for value in values]
    return torch.tensor(known, dtype=torch.float32)


def means(judged: Sequence[Tensor]) -> Tensor:
    """(B,) mean over the known steps of each response; NaN where none is known."""
    return torch.stack([values.nanmean() for values in judged])


def cuts_of(cutter: StepCutter, rollouts: Sequence[Rollout]) -> list[Cut]:
    """The steps of each response."""
    ids = [rollout.tokens.response for rollout in rollouts]
    return [Cut(cutter.ends(each), cutter.texts(each)) for each in ids]


def load_reward(
    spec: str,
    cfg: Run,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: nn.Module | None = None,
) -> Reward:
    """The reward that `reward=` names, for a policy with this tokenizer.

    Args:
        base: the policy, whose weights a reward adapter on the same base shares.

    Raises:
        UserError: a term is none, a folder holds no reward, the reference of a dpo policy is gone
            or has changed, or terms cut steps differently.
    """
    cutter = StepCutter(tokenizer, cfg.data.step_end)
    terms = []
    for term in terms_of(spec):
        source: RewardSource
        if (rule := rule_of(term.spec)) is not None:
            source = RuleReward(rule)
        elif function_of(term.spec) is not None:
            timeout: float = cfg.reward_timeout  # type: ignore[attr-defined]
            source = FunctionReward(UserFunction(term.spec, timeout), cutter)
        else:
            source = load_model_reward(
                term.spec, cfg.model, cfg.data, cfg.hardware, tokenizer, device, base
            )
        terms.append(LoadedTerm(term.weight, source))
    return Reward(terms, cutter)
