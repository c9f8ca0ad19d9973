"""Supervised fine-tuning: imitate demonstrations.

    L = - sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t     (InstructGPT 2203.02155, step 1)

over all response tokens of an optimizer step, and over all tokens of plain text. Reads a pretrained
model (`model.path`), or builds a small decoder and its tokenizer from the rows; writes a policy.

With select_by=reward the weights kept are those whose responses to held-out prompts a reward likes
best, as InstructGPT chose its SFT model, instead of those of the lowest held-out loss.

    rlhf-cli sft model=pretrained model.path=HuggingFaceTB/SmolLM2-135M data=jsonl data.path=d.jsonl
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import SftConfig
from rlhf_cli.data.batches import cut
from rlhf_cli.data.kinds import Demonstration, Prompt, Text
from rlhf_cli.data.order import EpochBatches, derived_seed
from rlhf_cli.data.rows import Split, read_split, read_texts
from rlhf_cli.data.tokens import Encoder, Tokens
from rlhf_cli.models.forward import response_nll
from rlhf_cli.models.load import load_policy, load_tokenizer, residual_dropout
from rlhf_cli.models.out_of_memory import keys_that_help
from rlhf_cli.models.score import mean_nll
from rlhf_cli.models.scratch import build_decoder, learn_tokenizer
from rlhf_cli.models.shared import recompute_activations
from rlhf_cli.reporting.console import Bar, show
from rlhf_cli.rewards.reward import Reward, load_reward
from rlhf_cli.rollout.rollouts import sample_rollouts
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.session import Session, begin
from rlhf_cli.training.best import Best
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer

REWARD_PROMPTS = 64  # held-out prompts whose responses choose the weights


def run(cfg: SftConfig) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo, hardware = cfg.algo, cfg.hardware
    rows = read_split(cfg.data, Demonstration)
    texts = read_texts(cfg.data) if algo.text_mix != 0 else Split([], [], [])
    policy, tokenizer = initial_policy(cfg, rows.train + texts.train, session.device)
    encoder = Encoder(tokenizer, cfg.data)
    train, held_out = encoder.demonstrations(rows.train), encoder.demonstrations(rows.held_out)
    most = None if algo.text_mix is None else round(algo.text_mix * len(train))
    if most is not None and most > len(texts.train):
        raise UserError(
            f"algo.text_mix={algo.text_mix:g} asks for {most} plain-text rows, there are "
            f"{len(texts.train)}; null takes all"
        )
    questions = questions_of(rows.held_out) if cfg.select_by == "reward" else []
    reward = judge_of(cfg, encoder, questions, session) if questions else None
    mixed = encoder.texts(texts.train[:most])
    session.note(encoder, rows.notes + texts.notes)
    train = train + mixed

    steps = math.ceil(len(train) / algo.batch_size) * algo.epochs
    steps = min(steps, algo.max_steps or steps)
    optimizer = Optimizer({"policy": (policy, algo.lr)}, algo, steps)
    best = Best(policy, *session.resume({"policy": policy}, optimizer))
    log = session.log()

    def loss(sequences: list[Tokens]) -> Loss:
        return response_nll(policy, sequences, chunk=hardware.logprob_chunk), {}

    lighter = partial(keys_that_help, hardware, logits=True, gradient=True)
    batches = EpochBatches(train, algo.batch_size, algo.epochs, cfg.seed, "sft")
    with Bar("sft", steps) as bar:
        bar.skip(session.start)
        for step, batch in zip(range(1, steps + 1), batches, strict=False):
            if step <= session.start:
                continue
            bar.advance()
            torch.manual_seed(derived_seed(cfg.seed, "dropout", step))
            policy.train()
            micro_batches = cut(batch, hardware.tokens_per_microbatch)
            part = LossTerm(micro_batches, loss, trained_tokens(batch), keys_that_help=lighter)
            metrics = optimizer.step([part])
            policy.eval()
            if step % algo.eval_every == 0 or step == steps:
                nll = mean_nll(policy, held_out, hardware)
                metrics |= {"eval/loss": nll, "eval/perplexity": math.exp(min(nll, 700.0))}
                line = f"loss {metrics['loss']:.3f}  held-out {nll:.3f}"
                if reward is not None:
                    liked = mean_reward(policy, encoder, questions, reward, cfg)
                    metrics |= liked
                    line += f"  reward {show(liked.get('eval/reward'))}"
                bar.advance(0, line)
                merit = -nll if reward is None else metrics.get("eval/reward", -math.inf)
                if algo.keep == "best":
                    best.offer(merit)
            log.write(step, metrics)
            session.save(step, {"policy": policy}, optimizer, best.state(), best.weights)

    best.put()
    policy.eval()
    final = {"eval/loss": mean_nll(policy, held_out, hardware)}
    if reward is not None:
        final |= mean_reward(policy, encoder, questions, reward, cfg)
    if texts.held_out:
        final["text/loss"] = mean_nll(policy, encoder.texts(texts.held_out), hardware)
    final["eval/perplexity"] = math.exp(min(final["eval/loss"], 700.0))
    return session.finish_model(policy, "policy", encoder, final)


def initial_policy(
    cfg: SftConfig, rows: list[Demonstration | Text], device: torch.device
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The pretrained model of model.path, or a decoder and a tokenizer from scratch."""
    if cfg.model.path is not None:
        tokenizer = load_tokenizer(cfg.model.path, cfg.model)
        policy = load_policy(cfg.model.path, cfg.model, tokenizer, device)
    else:
        assert cfg.model.vocab_size is not None
        tokenizer = learn_tokenizer([written(row, cfg) for row in rows], cfg.model.vocab_size)
        policy = build_decoder(cfg.model, len(tokenizer), derived_seed(cfg.seed, "init")).to(device)
    if cfg.model.dropout:
        residual_dropout(policy, cfg.model.dropout)
    if cfg.hardware.gradient_checkpointing:
        recompute_activations(policy)
    return policy, tokenizer


def questions_of(rows: list[Demonstration | Text]) -> list[Prompt]:
    """The held-out prompts whose responses are judged.

    Raises:
        UserError: the rows are plain text, which answers nothing.
    """
    questions = [
        Prompt(row.prompt, row.columns, row.source)
        for row in rows
        if isinstance(row, Demonstration)
    ]
    if not questions:
        raise UserError("select_by=reward judges responses, but no held-out row has a prompt")
    return questions[:REWARD_PROMPTS]


def judge_of(cfg: SftConfig, encoder: Encoder, questions: list[Prompt], session: Session) -> Reward:
    """The reward that chooses the weights."""
    assert cfg.reward is not None  # validate() refuses a missing reward
    reward = load_reward(cfg.reward, cfg, encoder.tokenizer, session.device)
    reward.check(questions, session.require)
    return reward


def mean_reward(
    policy: nn.Module, encoder: Encoder, rows: list[Prompt], reward: Reward, cfg: SftConfig
) -> dict[str, float]:
    """Mean reward of the greedy response to each held-out prompt (2203.02155 sec. 3.5).

    Returns:
        eval/reward, the mean over responses that have a reward, left out where none has; and
        eval/reward_none, the share of those that have none, where there are any.
    """
    prompts = list(zip(*encoder.prompts(rows), strict=True))
    rollouts = sample_rollouts(
        policy,
        encoder,
        prompts,
        Sampling(cfg.data.max_response_tokens, temperature=0.0),
        samples=1,
        seed=cfg.seed,
        stop_ids=encoder.stop_ids,
        hardware=cfg.hardware,
    )
    scores = reward.score(rollouts).total
    known = scores[~scores.isnan()]
    found = {"eval/reward": known.mean().item()} if len(known) else {}
    if len(known) < len(scores):
        found["eval/reward_none"] = 1 - len(known) / len(scores)
    return found


def written(row: Demonstration | Text, cfg: SftConfig) -> str:
    """A row as the text that a new tokenizer learns from."""
    if isinstance(row, Text):
        return row.text
    turns = row.prompt if isinstance(row.prompt, list) else [{"content": row.prompt}]
    prompt = "\n".join(turn["content"] for turn in turns)
    return cfg.data.template.replace("{prompt}", prompt) + row.completion


def trained_tokens(sequences: list[Tokens]) -> int:
    """Tokens that carry loss."""
    return sum(len(sequence.response) for sequence in sequences)
