"""What a stage does in a step, computed once more by the letter of its equation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.config.compose import compose
from rlhf_cli.data.batches import draw
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Demonstration
from rlhf_cli.data.rows import Rows, read_split
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.score import scores_of
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.rewards.models import CheckpointReward, statistics_of
from rlhf_cli.rewards.reward import load_reward
from rlhf_cli.stages import grpo, ppo
from tests.pace import fast
from tests.tiny import run_stage as run
from tests.tiny import words_of
from tests.toys import FROZEN, hardware_of, mean_nll

CPU = torch.device("cpu")
TEMPERATURE = 0.9
ONE_UPDATE = [
    *("algo.steps=2", "algo.epochs=1", "algo.minibatch_size=8", "hardware.save_every=null"),
    *("algo.warmup_steps=0", f"algo.temperature={TEMPERATURE}"),
]

pytestmark = pytest.mark.usefixtures("inside")


def sft_policy() -> Any:
    """The policy that every stage here starts from, and its encoder."""
    cfg = compose("dpo", words_of("dpo"))
    tokenizer = load_tokenizer("runs/demo/sft", FROZEN)
    model = load_policy("runs/demo/sft", FROZEN, tokenizer, CPU)
    return model, Encoder(tokenizer, cfg.data)


def critic_start(encoder: Encoder) -> CheckpointReward:
    """The reward model of the chain."""
    cfg = compose("ppo", words_of("ppo"))
    found = load_reward("runs/demo/reward", cfg, encoder.tokenizer, CPU).critic_start
    assert found is not None and isinstance(found.source, CheckpointReward)
    return found.source


def logprobs(model: Any, tokens: Tokens) -> Tensor:
    """Of the response, from plain logits at the sampling temperature: (n, V)."""
    ids = torch.tensor([tokens.prompt + tokens.response])
    with torch.no_grad():
        logits = model(ids).logits[0, len(tokens.prompt) - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, -1)


def taken(model: Any, tokens: Tokens) -> Tensor:
    """Log-probs of the response's own tokens."""
    return logprobs(model, tokens).gather(-1, torch.tensor(tokens.response)[:, None])[:, 0]


def on_cpu(trajectory: Any) -> Any:
    """A trajectory whose tensors may be compared with those of a test."""
    tensors = {name: each for name, each in vars(trajectory).items() if isinstance(each, Tensor)}
    return replace(trajectory, **{name: each.cpu() for name, each in tensors.items()})


class Spy:
    """Records the experience that a function of a stage is given, and what it makes of it."""

    def __init__(self, stage: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, Any]] = []
        function = getattr(stage, name)

        def spying(found: Any, *args: Any) -> Any:
            result = function(found, *args)
            self.calls.append((found, result))
            return result

        monkeypatch.setattr(stage, name, spying)


def test_sft_divides_by_the_tokens_of_the_whole_step(tmp_path: Path) -> None:
    sizes = [f"model.{name}=null" for name in ("vocab_size", "hidden_size", "layers", "heads")]
    start = ["model.path=runs/demo/sft", *sizes, "model.context=null", "model.dropout=0"]
    one = ["algo.batch_size=500", "algo.max_steps=1", "hardware.tokens_per_microbatch=90"]
    (entry,) = run("sft", tmp_path / "out", *start, *one)
    model, encoder = sft_policy()
    rows = read_split(encoder.data, Demonstration).train
    texts = Rows(encoder.data).texts().train[: round(0.5 * len(rows))]
    sequences = encoder.demonstrations(rows) + encoder.texts(texts)
    assert entry["loss"] == pytest.approx(mean_nll(model, sequences, hardware_of()), rel=1e-5)


def test_scores_are_centred_on_the_demonstrations() -> None:
    _, encoder = sft_policy()
    reward = critic_start(encoder)
    sequences = encoder.demonstrations(read_split(encoder.data, Demonstration).train)
    raw = scores_of(reward.model, sequences, hardware_of()).double()
    mean, std = statistics_of("runs/demo/reward")
    assert (mean, std) == pytest.approx((raw.mean().item(), raw.std().item()), rel=1e-4)


@pytest.mark.parametrize("whiten", fast([True], [True, False]))
def test_a_step_of_ppo(whiten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[list[Tokens]] = []

    def drawing(items: Any, count: int, seed: int, name: str, step: int) -> Any:
        drawn = draw(items, count, seed, name, step)
        if name == "ptx":
            texts.append(drawn)
        return drawn

    monkeypatch.setattr(ppo, "draw", drawing)
    spy = Spy(ppo, "trajectories_of", monkeypatch)
    words = [*ONE_UPDATE, f"algo.normalise_advantages={'batch' if whiten else 'none'}"]
    coefficients = [
        *("algo.gamma=0.9", "algo.lam=0.8", "algo.vf_coef=0.3", "algo.entropy_coef=0.7"),
        *("algo.ptx_coef=0.4", "algo.kl_coef=0.6", "algo.kl_controller=fixed"),
        *("algo.kl_target=null", "algo.kl_horizon=null", "algo.missing_eos_reward=-2"),
    ]
    entries = run("ppo", tmp_path / "out", *words, *coefficients)
    start, encoder = sft_policy()
    reward = critic_start(encoder)

    for step, (seen, (trajectories, _)) in enumerate(spy.calls):
        items = [on_cpu(trajectory) for trajectory in trajectories]
        rollouts, scores = seen.rollouts, seen.rewards.total
        found = []
        for rollout, score, item in zip(rollouts, scores.tolist(), items, strict=True):
            length = len(rollout.tokens.response)
            # the score of the checkpoint, or the missing-EOS rule
            raw = scores_of(reward.model, [rollout.tokens], hardware_of())
            ended = rollout.finish_reason == "eos"
            scored = ((raw - reward.mean) / reward.std).item() if ended else -2.0
            assert score == pytest.approx(scored, abs=1e-5)
            if step == 0:  # the critic is the reward model still: V of each state is its score
                states = [
                    Tokens(rollout.tokens.prompt, rollout.tokens.response[:t])
                    for t in range(length)
                ]
                raw = scores_of(reward.model, states, hardware_of())
                values = (raw - reward.mean) / reward.std
                torch.testing.assert_close(item.values, values, rtol=1e-4, atol=1e-5)
            # r_t = -kl_coef log(pi / ref), and the score at the end; GAE by its recursion
            rewards = -0.6 * (item.old - taken(start, rollout.tokens))
            rewards[-1] += score
            advantage, after = 0.0, 0.0
            advantages: list[float] = []
            for t in reversed(range(length)):
                delta = rewards[t].item() + 0.9 * after - item.values[t].item()
                advantage, after = delta + 0.9 * 0.8 * advantage, item.values[t].item()
                advantages.insert(0, advantage)
            expected = torch.tensor(advantages)
            found.append(expected)
            torch.testing.assert_close(item.returns, expected + item.values, rtol=1e-4, atol=1e-4)
        joined = torch.cat(found)
        if whiten:
            joined = (joined - joined.mean()) / joined.std(correction=0)
        ours = torch.cat([item.advantages for item in items])
        torch.testing.assert_close(ours, joined, rtol=1e-3, atol=1e-3)

        # on policy, at the one update of the iteration: means over all response tokens
        entry = entries[step]
        returns = torch.cat([item.returns for item in items])
        values = torch.cat([item.values for item in items])
        assert entry["loss/policy"] == pytest.approx(-ours.mean().item(), abs=1e-4)
        assert entry["loss/value"] == pytest.approx(
            0.5 * ((values - returns) ** 2).mean().item(), rel=1e-3
        )
        if step == 0:
            full = torch.cat([logprobs(start, rollout.tokens) for rollout in rollouts])
            entropy = -(full.exp() * full).sum(-1).mean().item()
            assert entry["loss/entropy"] == pytest.approx(entropy, rel=1e-4)
            sampled = torch.cat([taken(start, rollout.tokens) for rollout in rollouts])
            assert entry["entropy"] == pytest.approx(-sampled.mean().item(), rel=1e-4)
            nll = mean_nll(start, texts[0], hardware_of())
            assert entry["loss/ptx"] == pytest.approx(nll, rel=1e-4)
        total = entry["loss/policy"] + 0.3 * entry["loss/value"] - 0.7 * entry["loss/entropy"]
        assert entry["loss"] == pytest.approx(total + 0.4 * entry["loss/ptx"], abs=1e-4)
    assert abs(entries[1]["kl"]) > 1e-4  # the second iteration had something to pay or to gain


def test_a_step_of_grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(grpo, "trajectories_of", monkeypatch)
    words = [*ONE_UPDATE, "algo.group_size=4", "algo.kl_coef=0.5", "algo.missing_eos_reward=null"]
    entries = run("grpo", tmp_path / "out", *words)
    start, _ = sft_policy()
    for step, (seen, groups) in enumerate(spy.calls):
        rollouts, scores = seen.rollouts, seen.rewards.total.tolist()
        assert [len(group) for group in groups] == [4] * 8
        assert scores == [float("a" in rollout.text) for rollout in rollouts]
        terms = []
        for place, group in enumerate(groups):
            rewards = torch.tensor(scores[4 * place : 4 * place + 4])
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            group = [on_cpu(item) for item in group]
            for item, worth in zip(group, expected, strict=True):  # the same at every token
                everywhere = worth.expand(len(item.tokens.response))
                torch.testing.assert_close(item.advantages, everywhere, rtol=1e-4, atol=1e-5)
            asked = {tuple(item.tokens.prompt) for item in group}
            assert len(asked) == 1  # one prompt to a group
            for item in group:
                u = item.old - taken(start, item.tokens)
                terms.append((torch.exp(-u) - 1 + u).mean())
        entry = entries[step]
        # 1/B sum_i 1/len_i sum_t; on policy the ratio is 1
        assert entry["loss/kl"] == pytest.approx(torch.stack(terms).mean().item(), abs=1e-4)
        assert entry["loss/policy"] == pytest.approx(0, abs=1e-4)
        total = entry["loss/policy"] + 0.5 * entry["loss/kl"]
        assert entry["loss"] == pytest.approx(total, abs=1e-5)
    assert entries[1]["loss/kl"] > 1e-4
