"""Direct preference optimisation: preferences without a reward model.

    L = - mean log sigmoid(beta h),   h = log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)

(2305.18290 eq. 7; label smoothing as in cDPO). The reference is the policy as it started, so the
first loss is ln 2 and the first margin 0; the stage stops where they are not.

    rlhf-cli dpo policy=runs/demo/sft data=hh data.path=hh.jsonl algo.beta=0.1
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_cli.config.schema import Dpo
from rlhf_cli.data.batches import collate, cut, derived_seed, epochs_of
from rlhf_cli.data.kinds import Preference, Prompt
from rlhf_cli.data.rows import read_split
from rlhf_cli.data.tokens import TokenPair
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.load import Reference
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.objectives.kl import k1
from rlhf_cli.objectives.likelihood import sequence_logprob
from rlhf_cli.objectives.preference import dpo_loss
from rlhf_cli.reporting.console import Bar
from rlhf_cli.rollout.rollouts import sample_rollouts
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.training.optimize import Loss, Metrics, Optimizer, Part
from rlhf_cli.training.roles import Policy, load_role
from rlhf_cli.training.session import Session, begin

KL_PROMPTS = 64  # held-out prompts whose sampled responses estimate the KL


@dataclass
class ScoredPair:
    """A pair with the reference's log-prob of each side, once they are known."""

    pair: TokenPair
    chosen: float | None = None
    rejected: float | None = None

    def __len__(self) -> int:
        return len(self.pair)


def run(cfg: Dpo) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo, hardware = cfg.algo, cfg.hardware
    policy = load_role(session, cfg.policy)
    rows = read_split(cfg.data, Preference)
    train = [ScoredPair(pair) for pair in policy.encoder.preferences(rows.train)]
    held_out = [ScoredPair(pair) for pair in policy.encoder.preferences(rows.held_out)]
    session.note(policy.encoder, rows.notes)

    frozen = Reference(policy.model)
    ahead = held_out + train if algo.precompute_reference else held_out
    with Bar("reference log-probs", len(ahead)) as bar:
        for start in range(0, len(ahead), algo.batch_size):
            items = ahead[start : start + algo.batch_size]
            fill_reference(frozen, items, cfg)
            bar.advance(len(items))
    # precomputed, its memory is free again; eval/kl needs it and is left out
    reference = None if algo.precompute_reference else frozen
    del frozen

    steps = math.ceil(len(train) / algo.batch_size) * algo.epochs
    optimizer = Optimizer({"policy": (policy.model, algo.lr)}, algo, steps)
    session.resume({"policy": policy.model}, optimizer)
    log = session.log()

    def loss(pairs: list[ScoredPair]) -> Loss:
        sides = [item.pair.chosen for item in pairs] + [item.pair.rejected for item in pairs]
        batch = collate(sides, session.device)
        references = torch.tensor(
            [item.chosen for item in pairs] + [item.rejected for item in pairs]
        )
        grid = token_logprobs(policy.model, batch, chunk=hardware.logprob_chunk).logprobs
        logprobs = sequence_logprob(grid, batch.response)  # (2N,)
        ref_chosen, ref_rejected = references.to(logprobs).chunk(2)
        chosen, rejected = logprobs.chunk(2)
        losses, better, worse = dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, algo.beta, algo.label_smoothing
        )
        metrics = {
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "rewards/margin": better - worse,
            "rewards/accuracy": (better > worse).float() + 0.5 * (better == worse).float(),
            "logprobs/chosen": chosen.detach(),
            "logprobs/rejected": rejected.detach(),
        }
        return losses.sum(), {name: value.sum() for name, value in metrics.items()}

    def evaluate(pairs: list[ScoredPair]) -> Metrics:
        sums: Metrics = {}
        with torch.no_grad():
            for group in cut(pairs, hardware.tokens_per_microbatch):
                total, metrics = loss(group)
                for name, value in {"loss": total, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + value.item()
        means = {f"eval/{name}": value / len(pairs) for name, value in sums.items()}
        if reference is not None:
            means["eval/kl"] = sampled_kl(policy, reference, cfg)
        return means

    if session.start == 0:
        check_start(session, evaluate(held_out))
    batches = epochs_of(train, algo.batch_size, algo.epochs, cfg.seed, "dpo")
    with Bar("dpo", steps) as bar:
        for step, batch in enumerate(batches, 1):
            bar.advance()
            if step <= session.start:
                continue
            if reference is not None:
                fill_reference(reference, batch, cfg)
            part = Part(cut(batch, hardware.tokens_per_microbatch), loss, len(batch))
            metrics = optimizer.step([part])
            if step % algo.eval_every == 0 or step == steps:
                metrics |= evaluate(held_out)
                bar.advance(
                    0,
                    f"held-out loss {metrics['eval/loss']:.3f}  "
                    f"accuracy {metrics['eval/rewards/accuracy']:.3f}",
                )
            log.write(step, metrics)
            session.save(step, {"policy": policy.model}, optimizer, {})

    final = evaluate(held_out)
    return session.finish_model(policy.model, "policy", policy.encoder, final)


def fill_reference(reference: Reference, items: list[ScoredPair], cfg: Dpo) -> None:
    """The reference's log-probs of both sides, where they are not known yet."""
    unknown = [item for item in items if item.chosen is None]
    if not unknown:
        return
    sides = [item.pair.chosen for item in unknown] + [item.pair.rejected for item in unknown]
    with reference.active() as model:
        sums = [values.sum().item() for values in logprobs_of(model, sides, cfg.hardware)]
    for item, chosen, rejected in zip(
        unknown, sums[: len(unknown)], sums[len(unknown) :], strict=True
    ):
        item.chosen, item.rejected = chosen, rejected


def sampled_kl(policy: Policy, reference: Reference, cfg: Dpo) -> float:
    """KL(policy || reference) per response in nats, on responses to a few held-out prompts."""
    rows = [Prompt(row.prompt, {}, row.source) for row in read_split(cfg.data, Preference).held_out]
    prompts = list(zip(*policy.encoder.prompts(rows[:KL_PROMPTS]), strict=True))
    rollouts = sample_rollouts(
        policy.model,
        policy.encoder,
        prompts,
        Sampling(cfg.data.max_response_tokens),
        samples=1,
        seed=derived_seed(cfg.seed, "kl"),
        stop_ids=policy.stop_ids,
        hardware=cfg.hardware,
    )
    sequences = [rollout.tokens for rollout in rollouts]
    ours = logprobs_of(policy.model, sequences, cfg.hardware)
    with reference.active() as model:
        theirs = logprobs_of(model, sequences, cfg.hardware)
    return k1(torch.cat(ours), torch.cat(theirs)).sum().item() / len(rollouts)


def check_start(session: Session, before: Metrics) -> None:
    """With the starting policy as the reference the loss is ln 2 and the margin 0."""
    diagnosis = (
        "policy and reference are not the same model: an adapter was not loaded, dropout is on, "
        "or their numerics differ"
    )
    tolerance = 1e-3
    loss, margin = before["eval/loss"], before["eval/rewards/margin"]
    session.require("dpo_loss_at_start", loss, abs(loss - math.log(2)) < tolerance, diagnosis)
    session.require("dpo_margin_at_start", margin, abs(margin) < tolerance, diagnosis)
