"""Responses in every layout, padded, packed and with prompts once: they are what each is alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from rlhf_cli.data.batches import Batch, collate, collate_answers
from rlhf_cli.data.items import Answers
from rlhf_cli.data.packing import PACKED, PADDED, SHARED, Layout
from rlhf_cli.models.forward import response_scores, token_logprobs, token_scores
from rlhf_cli.models.heads import init_head
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.score import (
    logprobs_of,
    scores_of,
    token_scores_of,
    trunk_values_of,
    values_of,
)
from tests.toys import hardware_of, llama, mean_nll

VOCABULARY = 23
WIDE = 10_000


def group_of(prompt: int, *responses: int, seed: int = 0) -> Answers:
    """Random ids of these lengths."""
    draw = torch.Generator().manual_seed(1000 * seed + prompt)

    def ids(length: int) -> list[int]:
        drawn: list[int] = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        return drawn

    return Answers([1, *ids(prompt - 1)], [ids(length) for length in responses], None)


# pairs, rankings, a response alone; long, short and of one token
GROUPS = [group_of(17, 4, 7), group_of(1, 1, 1), group_of(19, 3, 1, 5, 2), group_of(4, 6)]
LAYOUTS = [PADDED, PACKED, SHARED]


def small(kind: Any, **changes: Any) -> Any:
    """A small config of a family that names its sizes as Llama does."""
    return kind(**{**llama(VOCABULARY).config.to_dict(), "model_type": kind.model_type, **changes})


def gpt2() -> nn.Module:
    """A random decoder with absolute positions."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model: nn.Module = GPT2LMHeadModel(config).eval()
    return model


def lora() -> nn.Module:
    """A random decoder under an adapter that changes it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model: nn.Module = peft.get_peft_model(llama(VOCABULARY), config)
    return model.eval()


def recomputing() -> nn.Module:
    """A random decoder with gradient checkpointing, in the mode in which it recomputes."""
    model = llama(VOCABULARY)
    recompute_activations(model)
    return model


def recomputing_lora() -> nn.Module:
    """The same under an adapter."""
    model = lora()
    recompute_activations(model)
    return model


def scorer(kind: Any = LlamaForSequenceClassification) -> Any:
    """A random decoder with a scalar head."""
    torch.manual_seed(0)
    model = kind(small(LlamaConfig, num_labels=1, classifier_dropout=0.0))
    init_head(model.score, 0)
    return model.eval()


LANGUAGE_MODELS: list[Callable[[], nn.Module]] = [
    lambda: llama(VOCABULARY),
    gpt2,
    lora,
    recomputing,
    recomputing_lora,
]
SCORERS = [LlamaForSequenceClassification, LlamaForTokenClassification]


def close(ours: Any, theirs: Any) -> None:
    """Equal up to the rounding of float32."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def gradients(model: nn.Module, output: Tensor) -> Tensor:
    """Gradient of a sum that weighs every entry of the output differently, by all parameters."""
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    grads = torch.autograd.grad((weights * output).sum(), trained, allow_unused=True)
    flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
    assert flat.abs().sum() > 0
    return flat


def same_in_all_layouts(model: nn.Module, compute: Callable[[Batch], Tensor]) -> None:
    """Outputs and gradients, relative to the largest."""
    found = []
    for layout in LAYOUTS:
        output = compute(collate_answers(GROUPS, layout=layout))
        slopes = gradients(model, output)
        found.append((output, slopes / slopes.abs().max()))
    close(found[1], found[0])
    close(found[2], found[0])


# --------------------------------------------------------------------------- all layouts


@pytest.mark.parametrize("make", LANGUAGE_MODELS)
@pytest.mark.parametrize("chunk", [3, WIDE])
def test_log_probs_and_gradients_are_the_same_in_all_layouts(
    make: Callable[[], nn.Module], chunk: int
) -> None:
    model = make()
    same_in_all_layouts(model, lambda batch: token_logprobs(model, batch, chunk=chunk).logprobs)


@pytest.mark.parametrize("kind", SCORERS)
def test_scores_and_gradients_are_the_same_in_all_layouts(kind: Any) -> None:
    model = scorer(kind)
    same_in_all_layouts(model, lambda batch: response_scores(model, batch))
    same_in_all_layouts(model, lambda batch: token_scores(model, batch) * batch.response.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_what_their_sequences_are(layout: Layout) -> None:
    model, judge = llama(VOCABULARY), scorer()
    answers = collate_answers(GROUPS, layout=layout)
    plain = collate([each for group in GROUPS for each in group.sequences])
    ours = token_logprobs(model, answers, chunk=WIDE).logprobs
    close(
        ours[answers.response],
        token_logprobs(model, plain, chunk=WIDE).logprobs[plain.response],
    )
    assert (ours[~answers.response] == 0).all()
    close(response_scores(judge, answers), response_scores(judge, plain))
    each_token = token_scores(judge, answers)
    close(each_token[answers.response], token_scores(judge, plain)[plain.response])
    close(each_token[:, -1], response_scores(judge, answers))  # pads repeat the last


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_alone_is_what_it_is_in_a_batch(layout: Layout) -> None:
    model = llama(VOCABULARY)
    batch = collate_answers(GROUPS, layout=layout)
    together = token_logprobs(model, batch, chunk=WIDE).logprobs[batch.response]
    alone = []
    for group in GROUPS:
        single = collate_answers([group], layout=layout)
        alone.append(token_logprobs(model, single, chunk=WIDE).logprobs[single.response])
    close(together, torch.cat(alone))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_response_does_not_see_the_others(changed: int) -> None:
    model, judge = llama(VOCABULARY), scorer()
    before = group_of(18, 4, 4, 4)
    responses = [list(each) for each in before.responses]
    responses[changed] = [3 + (id - 2) % 20 for id in responses[changed]]
    after = Answers(before.prompt, responses, None)
    others = [place for place in range(3) if place != changed]
    for compute in (
        lambda batch: token_logprobs(model, batch, chunk=WIDE).logprobs,
        lambda batch: token_scores(judge, batch),
    ):
        old, new = (compute(collate_answers([group], layout=SHARED)) for group in (before, after))
        assert torch.equal(old[others], new[others])
        assert not torch.allclose(old[changed], new[changed], atol=1e-2)


def test_a_response_sees_its_prompt_and_itself() -> None:
    """Were the prompt invisible, the layouts could agree in what both leave out."""
    model = llama(VOCABULARY)
    before = group_of(18, 4, 4)
    other_prompt = Answers(
        [before.prompt[0], before.prompt[1] % 20 + 3, *before.prompt[2:]], before.responses, None
    )
    first = [before.responses[1][0] % 20 + 3, *before.responses[1][1:]]
    other_start = Answers(before.prompt, [before.responses[0], first], None)
    base, moved, turned = (
        token_logprobs(model, collate_answers([group], layout=SHARED), chunk=WIDE).logprobs
        for group in (before, other_prompt, other_start)
    )
    assert (moved - base).abs().min() > 1e-4
    assert ((turned - base)[1].abs() > 1e-4).all()


# --------------------------------------------------------------------------- of many


@pytest.mark.parametrize("packing", ["auto", "false"])
@pytest.mark.parametrize("budget", [1, 40, WIDE])
def test_groups_come_back_in_order_whatever_the_budget(packing: str, budget: int) -> None:
    model, judge = llama(VOCABULARY), scorer()
    hardware = hardware_of(tokens_per_microbatch=budget, logprob_chunk=3, packing=packing)
    apart = replace(hardware, packing="false")
    sequences = [each for group in GROUPS for each in group.sequences]
    rows = logprobs_of(model, GROUPS, hardware)
    assert list(map(len, rows)) == [len(each.response) for each in sequences]
    close(rows, logprobs_of(model, sequences, apart))
    per_token = token_scores_of(judge, GROUPS, hardware)
    close(per_token, token_scores_of(judge, sequences, apart))
    scores = scores_of(judge, GROUPS, hardware)
    assert len(scores) == len(sequences)
    close(scores, scores_of(judge, sequences, apart))
    assert mean_nll(model, GROUPS, hardware) == pytest.approx(
        mean_nll(model, sequences, apart), abs=1e-6
    )


@pytest.mark.parametrize("packing", ["auto", "false"])
def test_values_are_those_of_the_states_before_each_token(packing: str) -> None:
    """Of a network, and of a head on the trunk, which must go by the grid."""
    critic, hardware = scorer(), hardware_of(packing=packing, tokens_per_microbatch=50)
    sequences = [each for group in GROUPS for each in group.sequences]
    alone = [
        critic.score(critic.model(torch.tensor([each.prompt + each.response])).last_hidden_state)
        for each in sequences
    ]
    expected = [
        values[0, len(each.prompt) - 1 : -1, 0]
        for values, each in zip(alone, sequences, strict=True)
    ]
    close(values_of(critic, sequences, hardware), [each.detach() for each in expected])
    on_trunk = trunk_values_of(critic, critic.score, sequences, hardware)
    close(on_trunk, [each.detach() for each in expected])
