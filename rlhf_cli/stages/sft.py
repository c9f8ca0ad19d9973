"""Supervised fine-tuning: imitate demonstrations.

    L = - sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t     (InstructGPT 2203.02155, step 1)

over all response tokens of an optimizer step, and over all tokens of plain text; or, with
algo=distill, what the model of the start says of them after a prefix (2112.00861 sec. 2.1.2):

    L = sum_t m_t KL(pi_0(. | prefix, x, y_<t) || pi(. | x, y_<t)) / sum_t m_t

Reads a pretrained
model (`model.path`), or builds a small decoder and its tokenizer from the rows; writes a policy.

With select_by=reward the weights kept are those whose responses to held-out prompts a reward likes
best, as InstructGPT chose its SFT model, instead of those of the lowest held-out loss.

    rlhf-cli sft model=pretrained model.path=HuggingFaceTB/SmolLM2-135M data=rows data.path=d.jsonl
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.algorithms import SftAlgo
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.stages import SftConfig
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.items import Tokens, response_tokens
from rlhf_cli.data.kinds import Demonstration, Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.store import Items, Joined, by_source
from rlhf_cli.data.templates import prefix_of
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evaluation.figures import held_out_loss
from rlhf_cli.models.dropout import residual_dropout, training_mode
from rlhf_cli.models.forward import distillation_kl, response_nll
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.placing import place
from rlhf_cli.models.positions import positions_of
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.scratch import build_decoder
from rlhf_cli.models.tokenizers import load_tokenizer, stop_ids_of
from rlhf_cli.reporting.console import Bar
from rlhf_cli.reporting.grid import show
from rlhf_cli.rewards.reward import load_reward
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.begin import begin
from rlhf_cli.runs.encoders import new_tokenizer
from rlhf_cli.runs.inherited import check_context, longest_sample
from rlhf_cli.runs.policy import Policy, check_reference, saying_how
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.runs.session import Session
from rlhf_cli.training.best import Best
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer

REWARD_PROMPTS = 64  # held-out prompts whose responses choose the weights
MAX_UNSCORED = 3  # evaluations in a row without any reward before the run stops


def run(cfg: SftConfig, plan: Plan | None = None) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    algo, hardware = cfg.algo, cfg.hardware
    policy = initial_policy(cfg, session)
    encoder = policy.encoder
    data, texts = session.data.tokenised(encoder, Demonstration), session.data.texts(encoder)
    if algo.text_mix == 0:
        texts = Dataset(Items.none(), Items.none(), [])
    train = data.train
    if len(texts.train):
        train = Joined(data.train, mixed_in(texts.train, len(data.train), algo))
    held_out = list(data.held_out)
    parts = by_source(data.held_out, held_out)
    judge = Judge(cfg, policy, session) if cfg.select_by == "reward" else None
    objective = objective_of(cfg, session, policy, data)
    session.note(data.notes + texts.notes, data)

    batches = session.data.batches(train, algo.batch_size, algo.epochs, "sft", algo.max_steps)
    steps = len(batches)
    optimizer = Optimizer({"policy": (policy.model, algo.rate)}, algo, steps, hardware)
    best = Best(policy.model, *session.resume({"policy": policy.model}, optimizer))
    log = session.log()

    learning = False  # a switch of every module: as often as it takes
    with Bar("sft", steps) as bar:
        for step in session.steps(bar):
            torch.manual_seed(derived_seed(cfg.seed, "dropout", step))
            if not learning:
                training_mode(policy.model)
                learning = True
            batch = batches[step - 1]
            metrics = optimizer.step([objective.term(batch)]) | session.cost(batch)
            if step % algo.eval_every == 0 or step == steps:
                policy.model.eval()
                learning = False
                metrics |= evaluate(policy, held_out, objective, judge, hardware)
                metrics |= by_part(policy, parts, hardware)
                bar.advance(0, held_out_line(metrics))
                if algo.keep == "best":
                    best.offer(merit_of(metrics, cfg.select_by))
            log.write(step, metrics)
            session.snapshot(step, policy.model, encoder)
            session.save(step, {"policy": policy.model}, optimizer, best.state(), best.weights)

    best.put()
    session.settle(policy.model)
    policy.model.eval()
    final = evaluate(policy, held_out, objective, judge, hardware, last=True)
    objective.check(session)
    final |= by_part(policy, parts, hardware)
    if texts.held_out:
        final |= held_out_loss("text/loss", policy.model, list(texts.held_out), hardware)
    return session.finish_model(policy.model, "policy", encoder, final)


class SftObjective:
    """The negative log-likelihood per response token."""

    def __init__(self, policy: nn.Module, hardware: Hardware) -> None:
        self._policy, self._hardware = policy, hardware
        self._layout = layout_of(policy, hardware)

    def term(self, batch: list[Tokens]) -> LossTerm:
        """The loss of an optimizer step, a mean over response tokens."""
        return LossTerm.of(batch, self.loss, response_tokens(batch), self._hardware, self._layout)

    def loss(self, sequences: list[Tokens]) -> Loss:
        """Of a micro-batch, summed over response tokens."""
        return response_nll(self._policy, sequences, self._hardware), {}

    def held_out(self, sequences: list[Tokens]) -> Metrics:
        """What is measured of held-out rows beside their log-likelihood."""
        return {}

    def check(self, session: Session) -> None:
        """Whether what was to stay as it was is so."""


class DistillObjective(SftObjective):
    """The divergence from what the model of the start says under a prefix, per response token."""

    def __init__(
        self, policy: nn.Module, hardware: Hardware, data: Dataset, prefixed: Dataset
    ) -> None:
        """Before a resume point is loaded, so that the policy is the model of the start.

        Args:
            prefixed: the rows of `data`, their prompts after the prefix.

        Raises:
            UserError: the tokens of a response are others there.
        """
        super().__init__(policy, hardware)
        self._reference = Reference(policy)
        self._prefixed: Sequence[Tokens] = Joined(prefixed.train, prefixed.held_out)
        self._places = {each.source: place for place, each in enumerate(self._prefixed)}
        for own in Joined(data.train, data.held_out):
            theirs = self._after_prefix(own) if own.source in self._places else None
            if theirs is None or (theirs.response, theirs.loss) != (own.response, own.loss):
                raise UserError(
                    f"{own.source}: after data.prefix its response has other tokens; let the "
                    "prefix end with a line of its own, and the row fit the model's positions"
                )

    def loss(self, sequences: list[Tokens]) -> Loss:
        """Of a micro-batch, summed over response tokens."""
        own = batch_of(self._policy, sequences, self._layout)
        prefixed = [self._after_prefix(each) for each in sequences]
        theirs = batch_of(self._policy, prefixed, self._layout)
        chunk = self._hardware.logits_at_once
        return distillation_kl(self._policy, own, self._reference, theirs, chunk=chunk).sum(), {}

    def held_out(self, sequences: list[Tokens]) -> Metrics:
        """eval/kl: the same divergence of held-out rows."""
        return {"eval/kl": self.term(sequences).evaluated()["loss"]}

    def check(self, session: Session) -> None:
        """The model of the start has stayed as it was."""
        check_reference(session, self._reference)

    def _after_prefix(self, own: Tokens) -> Tokens:
        return self._prefixed[self._places[own.source]]


def objective_of(cfg: SftConfig, session: Session, policy: Policy, data: Dataset) -> SftObjective:
    """What algo.loss says."""
    if cfg.algo.loss == "nll":
        return SftObjective(policy.model, cfg.hardware)
    context = positions_of(policy.model)
    encoder = Encoder(policy.tokenizer, cfg.data, context, prefix=prefix_of(cfg.data))
    encoder.ends_with(policy.stop_ids)
    prefixed = session.data.tokenised(encoder, Demonstration)
    return DistillObjective(policy.model, cfg.hardware, data, prefixed)


# --------------------------------------------------------------------------- items


def initial_policy(cfg: SftConfig, session: Session) -> Policy:
    """The pretrained model of model.path, or a decoder and a tokenizer from scratch."""
    device = session.device
    if cfg.model.path is not None:
        tokenizer = load_tokenizer(cfg.model.path, cfg.model)
        model = load_policy(cfg.model.path, cfg.model, tokenizer, device)
        session.introduce(model)
    else:
        tokenizer = new_tokenizer(cfg, session.rows)
        model = build_decoder(cfg.model, len(tokenizer), derived_seed(cfg.seed, "init"))
        place(model, cfg.model, torch.float32, device)
    if cfg.hardware.gradient_checkpointing is True:
        recompute_activations(model)
    if cfg.model.dropout:
        residual_dropout(model, cfg.model.dropout)
    context = positions_of(model)
    check_context(cfg, cfg.model.path, context)
    encoder = Encoder(tokenizer, cfg.data, context)
    if cfg.model.path is not None:
        encoder.ends_with(stop_ids_of(cfg.model.path, tokenizer))
        saying_how(cfg.model.path, encoder)
    return Policy.of(model, encoder, cfg.hardware)


def mixed_in(texts: Items[Tokens], demonstrations: int, algo: SftAlgo) -> Sequence[Tokens]:
    """The plain text that algo.text_mix asks for beside so many demonstrations.

    Raises:
        UserError: there is not that much.
    """
    if algo.text_mix is None:
        return texts
    count = round(algo.text_mix * demonstrations)
    if count > len(texts):
        raise UserError(
            f"algo.text_mix={algo.text_mix:g} asks for {count} plain-text rows, there are "
            f"{len(texts)}; null takes all"
        )
    return texts[:count]


# --------------------------------------------------------------------------- evaluation


class Judge:
    """The reward that chooses the weights, and the held-out prompts whose responses it judges."""

    def __init__(self, cfg: SftConfig, policy: Policy, session: Session) -> None:
        """Raises UserError where the rows are plain text, which answers nothing."""
        assert cfg.reward is not None  # validate() refuses a missing reward
        rows = session.rows.held_out(Demonstration).held_out
        demonstrations = [row for row in rows if isinstance(row, Demonstration)]
        questions = [Prompt(row.prompt, row.columns, row.source) for row in demonstrations]
        if not questions:
            raise UserError("select_by=reward judges responses, but no held-out row has a prompt")
        self._questions = questions[:REWARD_PROMPTS]
        self._greedy = Sampling(longest_sample(cfg), temperature=0.0)
        self._seed = cfg.seed
        self._reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device)
        self._reward.check(self._questions, session.require)
        self._unscored = 0  # evaluations in a row in which no response got a reward

    def metrics(self, policy: Policy, last: bool) -> Metrics:
        """Mean reward of the greedy response to each held-out prompt (2203.02155 sec. 3.5).

        Returns:
            eval/reward, the mean over responses that have a reward, left out where none has; and
            eval/reward_none, the share of those that have none, where there are any.

        Raises:
            RunError: none has, in the last evaluation or in several in a row.
        """
        prompts = policy.encoder.prompts(self._questions)
        policy.engine.update(policy.model)
        rollouts = policy.engine.sample(prompts, self._greedy, seed=self._seed)
        scores = self._reward.score(rollouts).total
        known = scores[~scores.isnan()]
        self._unscored = 0 if len(known) else self._unscored + 1
        if last or self._unscored == MAX_UNSCORED:
            self._reward.check_scored("reward", scores)
        metrics = {"eval/reward": known.mean().item()} if len(known) else {}
        if len(known) < len(scores):
            metrics["eval/reward_none"] = 1 - len(known) / len(scores)
        return metrics


def evaluate(
    policy: Policy,
    held_out: list[Tokens],
    objective: SftObjective,
    judge: Judge | None,
    hardware: Hardware,
    last: bool = False,
) -> Metrics:
    """The held-out loss and, with a judge, the mean reward of responses.

    Args:
        last: of the weights that are written.
    """
    metrics = held_out_loss("eval/loss", policy.model, held_out, hardware)
    metrics["eval/perplexity"] = math.exp(min(metrics["eval/loss"], 700.0))
    metrics |= objective.held_out(held_out)
    return metrics if judge is None else metrics | judge.metrics(policy, last)


def by_part(policy: Policy, parts: dict[str, list[Tokens]], hardware: Hardware) -> Metrics:
    """The held-out loss of each of several sources."""
    metrics: Metrics = {}
    for name, part in parts.items():
        metrics |= held_out_loss(f"eval/source/{name}/loss", policy.model, part, hardware)
    return metrics


def merit_of(metrics: Metrics, select_by: str) -> float:
    """What the best weights have most of."""
    if select_by == "reward":
        return metrics.get("eval/reward", -math.inf)
    return -metrics.get("eval/kl", metrics["eval/loss"])


def held_out_line(metrics: Metrics) -> str:
    """The figures to watch."""
    line = f"loss {metrics['loss']:.3f}  held-out {metrics['eval/loss']:.3f}"
    return f"{line}  reward {show(metrics['eval/reward'])}" if "eval/reward" in metrics else line
