"""Log-probs, values and scores: against the whole logits, and whatever the padding or the cut."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from rlhf_cli.data.batches import Batch, collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.forward import response_scores, state_values, token_logprobs, token_scores
from rlhf_cli.models.heads import init_head, value_head
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import (
    logprobs_of,
    scores_of,
    trunk_values_of,
    values_of,
)
from rlhf_cli.objectives.kl import k1, k3
from tests.toys import GivenLogits, bigram, grid_of, hardware_of, llama, mean_nll, sequences_of

SEQUENCES = sequences_of(7)
WIDE = 10_000


def scorer(seed: int = 0) -> Any:
    """A random decoder with a scalar head."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(replace_labels(llama(seed=seed).config))
    init_head(model.score, seed)
    return model.eval()


def replace_labels(config: Any) -> Any:
    config.num_labels = 1
    return config


def padded(sequence: Tokens, left: int, right: int) -> Batch:
    """One sequence with pads that attention does not see."""
    ids = sequence.prompt + sequence.response
    real = [False] * left + [True] * len(ids) + [False] * right
    start = left + len(sequence.prompt)
    trained = [start <= place < left + len(ids) for place in range(len(real))]
    filled = [9] * left + ids + [9] * right
    return grid_of(torch.tensor([filled]), torch.tensor([real]), torch.tensor([trained]))


# --------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_log_probs_and_entropy_are_those_of_the_whole_logits(temperature: float) -> None:
    model = llama()
    batch = collate(SEQUENCES)
    ours = token_logprobs(model, batch, chunk=3, temperature=temperature, with_entropy=True)
    logits = model(batch.ids, attention_mask=batch.attention.long()).logits / temperature
    full = torch.log_softmax(logits[:, :-1], -1)
    taken = full.gather(-1, batch.ids[:, 1:, None])[..., 0] * batch.response[:, 1:]
    torch.testing.assert_close(ours.logprobs[:, 1:], taken, rtol=0, atol=1e-5)
    entropy = -(full.exp() * full).sum(-1) * batch.response[:, 1:]
    assert ours.entropy is not None
    torch.testing.assert_close(ours.entropy[:, 1:], entropy, rtol=0, atol=1e-5)
    assert (ours.logprobs[~batch.response] == 0).all()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    model = llama()
    found = []
    for size in (chunk, WIDE):
        scored = token_logprobs(model, collate(SEQUENCES), chunk=size, with_entropy=True)
        assert scored.entropy is not None
        loss = (scored.logprobs**2).sum() + scored.entropy.sum()
        found.append((scored.logprobs, gradients(model, loss)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 5)])
def test_padding_changes_neither_log_probs_nor_gradients(left: int, right: int) -> None:
    model = llama()
    for sequence in SEQUENCES:
        found = []
        for batch in (padded(sequence, 0, 0), padded(sequence, left, right)):
            scored = token_logprobs(model, batch, chunk=WIDE).logprobs
            found.append((scored[batch.response], gradients(model, scored.sum())))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


def test_log_probs_come_back_in_order_whatever_the_budget() -> None:
    model = llama()
    alone = [logprobs_of(model, [each], hardware_of())[0] for each in SEQUENCES]
    for budget in (1, 20, WIDE):
        hardware = hardware_of(tokens_per_microbatch=budget, logprob_chunk=3)
        together = logprobs_of(model, SEQUENCES, hardware)
        assert [len(row) for row in together] == [len(each.response) for each in SEQUENCES]
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_prompt_gives_no_gradient_and_its_labels_do_not_matter() -> None:
    """The response's log-probs are the whole loss: as targets the prompt's ids play no part."""
    model = llama()
    batch = collate([Tokens([1, 5, 6, 7], [8, 9, 2])])
    table = model.get_output_embeddings().weight
    scored = token_logprobs(model, batch, chunk=WIDE).logprobs
    assert scored[0].nonzero()[:, 0].tolist() == [4, 5, 6]
    # d/d logits at positions 0 to 2, which predict the prompt, is zero
    logits = model(batch.ids).logits
    logits.retain_grad()
    full = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    (full * batch.response[:, 1:]).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0].abs().sum(-1) > 0).tolist() == [0, 0, 0, 1, 1, 1, 0]
    expected, table.grad = table.grad, None
    scored.sum().backward()
    torch.testing.assert_close(table.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_uniform_model_is_as_bad_as_the_vocabulary_is_large() -> None:
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    assert mean_nll(model, SEQUENCES, hardware_of()) == pytest.approx(math.log(23), abs=1e-6)
    scored = token_logprobs(model, collate(SEQUENCES), chunk=4, with_entropy=True)
    assert scored.entropy is not None
    entropies = scored.entropy[collate(SEQUENCES).response]
    torch.testing.assert_close(entropies, torch.full_like(entropies, math.log(23)))


def test_entropy_does_not_see_a_shift_of_the_logits() -> None:
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    ids, every = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
    batch = grid_of(ids, every, torch.arange(4) > torch.tensor([[0], [1]]))
    found = [
        token_logprobs(GivenLogits(values), batch, chunk=3, with_entropy=True).entropy
        for values in (logits, logits + 7.5)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert found[0] is not None and found[0].count_nonzero() == 5


def test_a_model_that_knows_the_next_token_has_no_loss() -> None:
    """A shift by one would show here: token i is always followed by i + 1."""
    model = bigram(200 * torch.roll(torch.eye(12), 1, 1))
    rising = [Tokens([3, 4], [5, 6, 7]), Tokens([1], [2, 3])]
    assert mean_nll(model, rising, hardware_of()) < 1e-6
    certain = token_logprobs(model, collate(rising), chunk=9, with_entropy=True)
    assert certain.entropy is not None and certain.entropy.abs().max() < 1e-6
    assert mean_nll(model, [Tokens([3, 4], [4, 6, 7])], hardware_of()) > 10


def test_the_mean_is_over_all_tokens() -> None:
    model = llama()
    hardware = hardware_of()
    rows = logprobs_of(model, SEQUENCES, hardware)
    total = -sum(row.double().sum().item() for row in rows)
    tokens = sum(len(each.response) for each in SEQUENCES)
    assert mean_nll(model, SEQUENCES, hardware) == pytest.approx(total / tokens, abs=1e-6)
    of_means = -sum(row.mean().item() for row in rows) / len(rows)
    assert abs(of_means - total / tokens) > 0.05


# --------------------------------------------------------------------------- KL to a reference


def test_the_full_kl_is_the_sum_over_the_vocabulary() -> None:
    """Two next tokens of probability (3/4, 1/4) against (1/2, 1/2): log 3 * 3/4 - log 2 nats."""
    policy, other = bigram(torch.zeros(12, 12)), bigram(torch.zeros(12, 12))
    with torch.no_grad():
        for model, odds in ((policy, 3.0), (other, 1.0)):
            table = torch.full((12, 12), -1e4)
            table[:, 5], table[:, 6] = math.log(odds), 0.0
            model.lm_head.weight[:, :12] = table.T
    rows = [Tokens([3], [5, 6]), Tokens([4, 3], [6])]
    batch = collate(rows)
    scored = token_logprobs(policy, batch, chunk=2, reference=Reference.of(other))
    assert scored.kl is not None
    expected = 0.75 * math.log(3) - math.log(2)
    torch.testing.assert_close(scored.kl[batch.response], torch.full((3,), expected))
    assert (scored.kl[~batch.response] == 0).all()
    # twice the temperature: odds of sqrt(3) against 1
    warm = token_logprobs(policy, batch, chunk=2, temperature=2.0, reference=Reference.of(other)).kl
    p = 3**0.5 / (1 + 3**0.5)
    of_sqrt = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert warm is not None and warm[0, 1].item() == pytest.approx(of_sqrt, abs=1e-6)


def test_sampled_estimates_of_the_kl_have_the_full_one_as_their_mean() -> None:
    policy, other = llama(seed=1), llama(seed=2)
    many = [Tokens([1, 7], [token]) for token in range(23)]  # every answer, weighed by its chance
    batch = collate(many)
    ours = token_logprobs(policy, batch, chunk=5, reference=Reference.of(other))
    assert ours.kl is not None
    theirs = token_logprobs(other, batch, chunk=5).logprobs[batch.response]
    ours_at = ours.logprobs[batch.response]
    exact = ours.kl[batch.response]
    assert exact.std() < 1e-5 and exact[0] > 0.1
    for estimator in (k1, k3):
        mean = (ours_at.exp() * estimator(ours_at, theirs)).sum()
        torch.testing.assert_close(mean, exact[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_kl_moves_the_policy_only_and_its_gradient_is_that_of_the_whole_logits(
    chunk: int,
) -> None:
    policy, other = llama(seed=1), llama(seed=2)
    batch = collate(SEQUENCES)
    reference = Reference.of(other)
    scored = token_logprobs(policy, batch, chunk=chunk, temperature=0.7, reference=reference)
    assert scored.kl is not None
    found = gradients(policy, scored.kl.sum())
    assert not any(weight.requires_grad for weight in other.parameters())
    ours, theirs = (
        torch.log_softmax(
            model(batch.ids, attention_mask=batch.attention.long()).logits[:, :-1] / 0.7, -1
        )
        for model in (policy, other)
    )
    whole = ((ours.exp() * (ours - theirs)).sum(-1) * batch.response[:, 1:]).sum()
    torch.testing.assert_close(scored.kl.sum(), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, gradients(policy, whole), rtol=1e-3, atol=1e-4)


def test_a_policy_that_is_its_reference_has_no_kl() -> None:
    policy = llama()
    batch = collate(SEQUENCES)
    scored = token_logprobs(policy, batch, chunk=4, reference=Reference(policy))
    assert scored.kl is not None and scored.kl.abs().max() < 1e-6
    assert token_logprobs(policy, batch, chunk=4).kl is None


# --------------------------------------------------------------------------- scores


def test_a_value_head_on_the_policys_trunk_reads_the_state_before_each_token() -> None:
    policy = llama()
    batch = collate(SEQUENCES)
    head = value_head(policy)
    start = token_logprobs(policy, batch, chunk=4, value_head=head)
    assert start.values is not None and (start.values == 0).all()
    init_head(head, 3)
    scored = token_logprobs(policy, batch, chunk=4, value_head=head)
    assert scored.values is not None
    torch.testing.assert_close(scored.logprobs, start.logprobs, rtol=0, atol=0)
    separate = LlamaForSequenceClassification(replace_labels(policy.config)).eval()
    separate.model, separate.score = policy.model, head
    expected = state_values(separate, batch)[batch.response]
    torch.testing.assert_close(scored.values[batch.response], expected)
    assert (scored.values[~batch.response] == 0).all()
    hardware = hardware_of(tokens_per_microbatch=20)
    values = trunk_values_of(policy, head, SEQUENCES, hardware)
    torch.testing.assert_close(torch.cat(values), expected)
    grad = torch.autograd.grad(scored.values.sum(), [head.weight, *policy.model.parameters()])
    assert all(each.abs().max() > 0 for each in grad)  # the trunk learns values too


def test_a_score_is_read_at_the_last_token_whatever_the_padding() -> None:
    model = scorer()
    alone = scores_of(model, SEQUENCES[:1], hardware_of()).tolist()
    alone += [response_scores(model, collate([each])).item() for each in SEQUENCES[1:]]
    together = scores_of(model, SEQUENCES, hardware_of(tokens_per_microbatch=30))
    torch.testing.assert_close(together, torch.tensor(alone), rtol=0, atol=1e-5)
    for sequence, score in zip(SEQUENCES, alone, strict=True):
        right = padded(sequence, 0, 6)
        assert response_scores(model, right).item() == pytest.approx(score, abs=1e-5)
        last = len(sequence) - 1
        assert token_scores(model, right)[0, last].item() == pytest.approx(score, abs=1e-5)
        assert model(collate([sequence]).ids).logits.item() == pytest.approx(score, abs=1e-5)


def test_a_value_is_that_of_the_state_before_the_token() -> None:
    model = scorer()
    batch = collate(SEQUENCES)
    scores, values = token_scores(model, batch), state_values(model, batch)
    torch.testing.assert_close(values[:, 1:], scores[:, :-1])
    rows = values_of(model, SEQUENCES, hardware_of(tokens_per_microbatch=25))
    for i, (row, each) in enumerate(zip(rows, SEQUENCES, strict=True)):
        start = len(each.prompt) - 1  # the state after the prompt
        torch.testing.assert_close(
            row, scores[i, start : start + len(each.response)], rtol=0, atol=1e-5
        )
    # changing a token changes no value up to and including its own state
    changed = replace(SEQUENCES[3], response=[*SEQUENCES[3].response[:-1], 5])
    after = state_values(model, collate([changed]))
    torch.testing.assert_close(after, state_values(model, collate([SEQUENCES[3]])))


def test_a_head_starts_small_and_fixed_by_its_seed() -> None:
    head = nn.Linear(1023, 200)
    init_head(head, 3)
    weights = head.weight.detach().clone()
    assert weights.std().item() == pytest.approx(1 / 32, rel=0.02)  # d + 1 = 1024
    assert abs(weights.mean().item()) < 4 * (1 / 32) / weights.numel() ** 0.5
    assert head.bias.abs().sum() == 0
    init_head(head, 3)
    assert torch.equal(head.weight, weights)
    init_head(head, 4)
    assert not torch.equal(head.weight, weights)
