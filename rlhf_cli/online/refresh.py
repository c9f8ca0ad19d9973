"""The reward model of iterative GRPO: trained further on what the policy writes now.

    L = -log sigmoid(r(x, y_w) - r(x, y_l))            y_w, y_l: responses of one group

A reward model knows the responses that it was trained on; the policy moves away from them. So in
every outer iteration it learns from new pairs and, lest it forget, from a share of old ones
(DeepSeekMath 2402.03300 sec. 4.1.4 and algorithm 1; a tenth there). The pairs are labelled by a
judge: another reward, which is never what the policy learns from.

A group gives one pair, its best and its worst response by the judge, if they differ. Pairs of all
its responses would repeat each of them G - 1 times, on which a reward model overfits within one
pass (2203.02155 sec. 3.5), and most would be between near equals, where a judge errs most.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import GrpoConfig
from rlhf_cli.config.stages import stage_name
from rlhf_cli.data.batches import EpochBatches
from rlhf_cli.data.items import Answers
from rlhf_cli.data.kinds import Preference, Prompt
from rlhf_cli.data.order import order_of
from rlhf_cli.data.reading import KindError
from rlhf_cli.evaluation.judging import accuracy
from rlhf_cli.folders.files import seal_whole, whole_folder
from rlhf_cli.folders.manifest import RESPONSE, read_manifest
from rlhf_cli.models.assembled import assembled
from rlhf_cli.models.dtypes import SOURCE, type_to_write
from rlhf_cli.models.forward import response_scores
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.models.masters import give_masters, master_of, put
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.save import save_model, save_tokenizer
from rlhf_cli.models.score import scores_of
from rlhf_cli.models.sharding import hold_parts_in_float32
from rlhf_cli.models.shared import SharedScorer, save_scorer
from rlhf_cli.objectives.reward_model import bradley_terry_loss
from rlhf_cli.objectives.rounding import EQUAL, differ
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.metrics import round_figures
from rlhf_cli.rewards.models import CheckpointReward
from rlhf_cli.rewards.reward import Reward, load_reward
from rlhf_cli.rewards.specs import refreshed_model
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.begun import begun_with
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.policy import Policy
from rlhf_cli.runs.session import Session
from rlhf_cli.runs.weights import tensors_of
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer

PAIRS = "pairs.jsonl"  # of a step: ids of prompt, better and worse response, in its own vocabulary
KEPT = ("head", "tokenizer", "eos_ids", "pad_id", "template")  # what stays so in its stage.json


class RewardRefresh:
    """Collects pairs at every step, and trains the reward model on them at every refresh.

    Between refreshes the reward model is frozen, as any reward is. Each refresh is one pass with an
    AdamW of its own, at a constant rate: it leaves nothing behind but weights and statistics.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        session: Session,
        policy: Policy,
        reward: Reward,
        rows: Sequence[Prompt],
    ) -> None:
        """`rows`: that the policy responds to.

        Raises:
            UserError: the reward has no reward model to train, or the judge cannot judge the rows.
        """
        assert cfg.judge is not None
        self._cfg, self._session = cfg, session
        path = refreshed_model(cfg.reward)
        sources = [term.source for term in reward.terms if term.source.spec == path]
        assert isinstance(sources[0], CheckpointReward)
        self.source = sources[0]
        if self.source.reader.padding is not None:
            raise UserError(
                f"algo.refresh_reward: {path} takes EOS for padding and scores the token before; "
                "it can be a reward, but not learn on: train one by `rlhf-cli reward`"
            )
        self._encoder = self.source.reader.encoder or policy.encoder
        model = self.source.model
        if cfg.hardware.gradient_checkpointing is True:
            recompute_activations(model)
        self._layout = layout_of(model, cfg.hardware)
        hold_parts_in_float32(model)
        self._weights = own_weights(model, policy.model)
        give_masters(self._weights.values())
        self._judge = load_reward(cfg.judge, cfg, policy.tokenizer, session.device)
        self._judge.check(rows, session.require, "judge")
        self._known = self._preferences() if cfg.algo.refresh_replay else []
        self._pairs: list[tuple[int, Answers]] = []
        self._metrics: Metrics = {}  # of the last refresh

    def _preferences(self) -> list[Answers]:
        """The preference rows of `data`, as the reward model reads them; none of other data."""
        try:
            data = self._session.data.tokenised(self._encoder, Preference)
        except KindError:
            return []
        context = self.source.reader.context
        fitting = [pair for pair in data.train if context is None or len(pair) <= context]
        for line in data.notes:
            say(line)
        say(f"the first refresh replays from {len(fitting)} preference rows")
        return fitting

    # ------------------------------------------------------------------ steps

    def collect(self, step: int, rollouts: Sequence[Rollout]) -> Metrics:
        """Keep the best and the worst of each group; returns the judge's mean over all."""
        scores = self._judge.score(rollouts).total  # (B,)
        sequences = self.source.reader.sequences(rollouts)
        unread = torch.tensor([sequence is None for sequence in sequences])
        readable = scores.masked_fill(unread, math.nan)
        for best, worst in best_and_worst(readable, self._cfg.algo.group_size):
            better, worse = sequences[best], sequences[worst]
            assert better is not None and worse is not None
            prompt = min(better.prompt, worse.prompt, key=len)  # either may be cut to fit
            self._pairs.append((step, Answers(prompt, [better.response, worse.response], None)))
            row = {"prompt": prompt, "chosen": better.response, "rejected": worse.response}
            self._log.write(step, row)
        known = scores[~scores.isnan()]
        return {"judge": known.mean().item()} if len(known) else {}

    def is_time(self, step: int) -> bool:
        """Whether the reward model is trained after this step."""
        assert self._cfg.algo.refresh_reward is not None
        return step % self._cfg.algo.refresh_reward == 0

    def train(self, step: int) -> Metrics:
        """Train the reward model on the pairs since the last refresh, and on a share of old ones.

        Its statistics are then those of its scores of the new pairs' responses: training moves
        their scale, which the pairs leave free, and all that is weighed against the reward (KL,
        penalties, other terms) was weighed against one of unit spread, where the policy is.

        Returns:
            refresh/pairs and refresh/replayed, and if there are pairs refresh/loss, its mean over
            the pass, and the accuracy on the new pairs before and after it.
        """
        algo = self._cfg.algo
        assert algo.refresh_reward is not None and algo.refresh_replay is not None
        since = step - algo.refresh_reward
        new = [pair for made, pair in self._pairs if made > since]
        old = self._known + [pair for made, pair in self._pairs if made <= since]
        count = round(len(new) * algo.refresh_replay / (1 - algo.refresh_replay))
        picked = order_of(len(old), self._cfg.seed, f"replay {step}", 0)[:count]
        metrics = {"refresh/pairs": float(len(new)), "refresh/replayed": float(len(picked))}
        if not new:
            return metrics
        metrics["refresh/accuracy_before"] = accuracy(*self._scores(new).unbind(-1)).mean().item()
        metrics["refresh/loss"] = self._fit([*new, *(old[i] for i in picked)], step)
        scores = self._scores(new)  # (N, 2)
        metrics["refresh/accuracy"] = accuracy(*scores.unbind(-1)).mean().item()
        std = scores.std().item()
        if math.isfinite(std) and std > 0:
            self.source.mean, self.source.std = scores.mean().item(), std
        self._metrics = metrics
        return metrics

    def _scores(self, pairs: list[Answers]) -> Tensor:
        """(N, 2) raw scores of better and worse responses."""
        scores = scores_of(self.source.model, pairs, self._cfg.hardware)
        return scores.view(-1, 2).double()

    def _fit(self, pairs: list[Answers], step: int) -> float:
        """One pass over pairs in seeded order; returns the mean loss of each as it was learnt."""
        algo, seed, model = self._cfg.algo, self._cfg.seed, self.source.model
        assert algo.refresh_lr is not None and algo.refresh_batch_size is not None
        batches = EpochBatches(pairs, algo.refresh_batch_size, 1, seed, f"refresh {step}")
        constant = replace(algo, lr_schedule="constant", warmup_steps=0)
        for weight in self._weights.values():
            weight.requires_grad_(True)
        optimizer = Optimizer(
            {"reward": (model, algo.refresh_lr)}, constant, len(batches), self._cfg.hardware
        )
        total = 0.0
        for batch in batches:
            term = LossTerm.of(
                *(batch, self._loss, len(batch), self._cfg.hardware, self._layout), logits=False
            )
            update = optimizer.step([term])
            total += update["loss"] * len(batch)
        for weight in self._weights.values():
            weight.requires_grad_(False)
            master_of(weight).grad = None
        return total / len(pairs)

    def _loss(self, pairs: list[Answers]) -> Loss:
        """Summed over pairs."""
        model = self.source.model
        scores = response_scores(model, batch_of(model, pairs, self._layout))  # (2 N,)
        chosen, rejected = scores.view(-1, 2).unbind(-1)
        return bradley_terry_loss(chosen, rejected).sum(), {}

    # ------------------------------------------------------------------ resume, end

    def state(self) -> dict[str, Any]:
        """What goes into a resume point beside `tensors`."""
        own = {"mean": self.source.mean, "std": self.source.std, "metrics": self._metrics}
        return {"refresh": own}

    def tensors(self) -> dict[str, Tensor]:
        """The reward model's weights, once they are not those of its folder any more."""
        weights = self._weights.items() if self._metrics else ()
        return {f"reward/{name}": master_of(weight).detach() for name, weight in weights}

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` and `tensors` returned, with the pairs up to there."""
        self._log = self._session.log(PAIRS)
        for row in by_main(self._log.rows):
            pair = Answers(row["prompt"], [row["chosen"], row["rejected"]], None)
            self._pairs.append((row["step"], pair))
        for name, weight in tensors_of(tensors, "reward").items():
            put(self._weights[name], weight)
        if own := state.get("refresh"):
            self.source.mean, self.source.std = own["mean"], own["std"]
            self._metrics = own["metrics"]

    def write(self) -> None:
        """`out/reward`: the reward model as it is now, a folder that any stage takes as reward."""
        if self._metrics:
            with assembled(self.source.model):
                by_main(self._write)

    def _write(self) -> None:
        cfg, source = self._cfg, self.source
        folder = self._session.out / "reward"
        before = read_manifest(source.path) or {}
        manifest = {
            "stage": stage_name(cfg),
            "kind": "reward",
            **begun_with(self._session.out),
            "seed": cfg.seed,
            **{name: before[name] for name in KEPT if name in before},
            "level": RESPONSE,
            "reward": {"mean": source.mean, "std": source.std},
            "metrics": round_figures(self._metrics),
        }
        check_lock(self._session.out)
        with whole_folder(folder) as part:
            if isinstance(source.model, SharedScorer):
                chosen = cfg.model.save_dtype
                dtype = None if chosen == SOURCE else getattr(torch, chosen)
                save_scorer(source.model, source.path, part, dtype)
                save_tokenizer(self._encoder.tokenizer, part)
            else:
                dtype = type_to_write(source.model, cfg.model.save_dtype, merge=True)
                save_model(source.model, self._encoder.tokenizer, part, True, dtype)
            seal_whole(part, manifest)
            check_lock(self._session.out)
        say(f"the refreshed reward model: {folder}")


def best_and_worst(scores: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """Places of the best and the worst of each group of `size` whose scores are not all EQUAL.

    Of several that are equally good or bad, the first.

    Args:
        scores: (B,), NaN where a response has none and takes no part.
    """
    for start in range(0, len(scores), size):
        group = scores[start : start + size]
        if differ(group):
            best, worst = group.nan_to_num(-math.inf).max(), group.nan_to_num(math.inf).min()
            as_good = group >= best - EQUAL * best.abs().clamp(min=1)
            as_bad = group <= worst + EQUAL * worst.abs().clamp(min=1)
            yield start + int(as_good.nonzero()[0]), start + int(as_bad.nonzero()[0])


def own_weights(model: nn.Module, policy: nn.Module) -> dict[str, nn.Parameter]:
    """What a refresh trains: adapter and head, or all weights but frozen ones of the policy."""
    lent = set() if isinstance(model, SharedScorer) else {id(each) for each in policy.parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) not in lent}
