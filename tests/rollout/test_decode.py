"""The decoder against transformers, against the scorer, and whatever the batch."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.rollout import native
from rlhf_cli.rollout.decode import Completion, decode
from rlhf_cli.rollout.feeding import way_of
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slot_probe import fits_slots
from tests.pace import fast
from tests.toys import bigram, bpe, characters, data_of, hardware_of, llama

PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 3, 20, 6, 8], [1, 4, 4]]
EOS = 2


def run(
    model: Any,
    sampling: Sampling,
    prompts: list[list[int]] = PROMPTS,
    samples: int = 1,
    seed: int = 0,
) -> list[Completion]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(prompts) * samples, sampling.max_tokens, generator=generator)
    return decode(model, prompts, noise, sampling, [EOS], lambda ids: " ".join(map(str, ids)))


def gpt2() -> Any:
    """Absolute positions: a pad that counted as one would show."""
    torch.manual_seed(0)
    size = GPT2Config(
        vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4
    )
    return GPT2LMHeadModel(size).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_greedy_is_transformers_greedy(make: Any) -> None:
    model = make()
    ours = run(model, Sampling(12, temperature=0))
    for prompt, found in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert found.ids == theirs
        assert found.finish_reason == ("eos" if theirs[-1] == EOS else "length")


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_what_training_scores(make: Any, temperature: float) -> None:
    """The first ratio is 1: prefix cache and left padding against one right-padded pass."""
    model = make()
    found = run(model, Sampling(10, temperature), samples=3)
    sequences = [Tokens(PROMPTS[i // 3], each.ids) for i, each in enumerate(found)]
    assert len({len(each.ids) for each in found}) > 1
    scored = logprobs_of(model, sequences, hardware_of(), temperature)
    for each, values in zip(found, scored, strict=True):
        assert each.logprobs == pytest.approx(values.tolist(), abs=1e-5)


def test_filters_do_not_touch_the_log_probs() -> None:
    model = llama()
    sampling = Sampling(8, 0.7, top_k=3, top_p=0.9, repetition_penalty=1.3, min_tokens=3)
    found = run(model, sampling)
    sequences = [Tokens(prompt, each.ids) for prompt, each in zip(PROMPTS, found, strict=True)]
    scored = logprobs_of(model, sequences, hardware_of(), 0.7)
    for each, values in zip(found, scored, strict=True):
        assert each.logprobs == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
)
def test_every_cold_limit_is_greedy(options: dict[str, Any]) -> None:
    model = llama()
    greedy = [each.ids for each in run(model, Sampling(9, 0.0))]
    assert [each.ids for each in run(model, Sampling(9, **options))] == greedy


def test_neutral_options_draw_the_same_tokens() -> None:
    model = llama()
    plain = run(model, Sampling(9), samples=2)
    neutral = Sampling(9, 1.0, top_k=23, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert run(model, neutral, samples=2) == plain
    assert run(model, Sampling(9), samples=2, seed=1) != plain


def test_lengths() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 4  # the EOS is likely, or very unlikely
    free = run(model, Sampling(12), samples=16)
    ends = [each.ids.index(EOS) + 1 if EOS in each.ids else None for each in free]
    assert {each.finish_reason for each in free} == {"eos", "length"}
    for each, end in zip(free, ends, strict=True):
        assert len(each.ids) == (end or 12)  # nothing follows the first EOS
        assert each.finish_reason == ("length" if end is None else "eos")
        assert len(each.logprobs) == len(each.ids)
    assert min(end for end in ends if end) < 4
    held = run(model, Sampling(12, min_tokens=4), samples=16)
    assert all(EOS not in each.ids[:4] and len(each.ids) >= 4 for each in held)


def test_a_token_at_the_limit_that_is_an_eos_is_an_end() -> None:
    table = torch.full((6, 6), -50.0)
    table[1, 3], table[3, EOS] = 50, 50
    (found,) = run(bigram(table), Sampling(2), [[1]])
    assert (found.ids, found.finish_reason) == ([3, EOS], "eos")
    (short,) = run(bigram(table), Sampling(1), [[1]])
    assert (short.ids, short.finish_reason) == ([3], "length")


def test_stop_strings_end_a_response_before_them() -> None:
    table = torch.full((12, 12), -50.0)
    for i in range(3, 11):
        table[i, i + 1] = 50  # 3 4 5 6 ... : d e f g
    encoder = Encoder(characters(first=97), data_of())  # id 3 is d
    row = (Prompt("d"), [3])
    (found,) = rollouts(bigram(table), encoder, [row], Sampling(8, stop=("zz", "ghi", "h")))
    assert found.finish_reason == "stop"
    assert found.tokens.response == [4, 5, 6, 7]  # the tokens that were drawn, e f g h
    assert found.text == "efg"
    assert found.ended


def rollouts(
    model: Any, encoder: Encoder, prompts: Any, sampling: Sampling, samples: int = 1, **more: Any
) -> list[Rollout]:
    hardware = hardware_of(rollout_tokens=more.pop("budget", 10_000))
    engine = NativeEngine(model, encoder, hardware)
    seed = more.pop("seed", 0)
    return engine.sample(prompts, sampling, samples=samples, seed=seed, **more)


def test_the_repetition_penalty_sees_no_pad() -> None:
    """The short prompt is padded beside the long one; alone it is not."""
    model = llama()
    sampling = Sampling(8, 0.0, repetition_penalty=1.8)
    for pad in (0, 5, 9):
        longer = [1, *[pad] * 8, 3]
        together = run(model, sampling, [[4, 6], longer])
        assert together[0].ids == run(model, sampling, [[4, 6]])[0].ids
    assert run(model, sampling)[2].ids != run(model, Sampling(8, 0.0))[2].ids


@pytest.mark.parametrize("budget", [1, 60, 200])
def test_rollouts_do_not_depend_on_the_batch(budget: int) -> None:
    tokenizer = bpe()
    model = llama(len(tokenizer))
    encoder = Encoder(tokenizer, data_of())
    texts = ["the cat", "a", "the dog ran to the red boat", "two plus two", "a song"]
    prompts = encoder.prompts([Prompt(text) for text in texts])
    told: list[int] = []
    sampling = Sampling(7, 0.9)
    whole = rollouts(model, encoder, prompts, sampling, 3)
    cut = rollouts(model, encoder, prompts, sampling, 3, budget=budget, advance=told.append)
    assert [each.row.prompt for each in whole] == [text for text in texts for _ in range(3)]
    for one, other in zip(whole, cut, strict=True):
        assert one.tokens == other.tokens
        assert one.text == other.text
        # either is within 7e-6 of float64, as this toy's large weights have it
        assert one.logprobs == pytest.approx(other.logprobs, abs=1.5e-5)
    assert sum(told) == 15 and (budget > 60 or len(told) > 1)
    responses = {tuple(each.tokens.response) for each in whole}
    assert len(responses) > 10  # samples of one prompt differ
    twice = rollouts(model, encoder, prompts[:1] * 2, sampling, 3)
    assert [each.tokens for each in twice[:3]] != [each.tokens for each in twice[3:]]
    reseeded = rollouts(model, encoder, prompts, sampling, 3, seed=1)
    assert [each.tokens for each in reseeded] != [each.tokens for each in whole]


@pytest.mark.parametrize("in_slots", [True, False])
@pytest.mark.parametrize("most", fast([2], [1, 2, 5]))
def test_responses_do_not_change_where_fewer_are_drawn_at_once(
    most: int, in_slots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the plain decoder whole prompts are parted first, then the samples of one prompt."""
    drawn: list[int] = []
    if not in_slots:
        monkeypatch.setattr(native, "fits_slots", lambda model, reach: False)

    def sample(limit: int) -> list[Rollout]:
        model = llama(vocabulary=300)
        way_of(model)  # tried on two rows
        fits_slots(model, 13)

        def look(module: Any, args: Any, kwargs: Any) -> None:
            drawn.append(len(kwargs["input_ids"]))
            if drawn[-1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.model.register_forward_pre_hook(look, with_kwargs=True)
        prompts = [(Prompt("p", source=f"rows.jsonl:{i}"), ids) for i, ids in enumerate(PROMPTS)]
        encoder = Encoder(bpe(), data_of())
        more: dict[str, Any] = {"budget": 999, "seed": 5, "advance": told.append}
        return rollouts(model, encoder, prompts, Sampling(6), samples=3, **more)

    told: list[int] = []
    whole = sample(99)
    drawn.clear()
    told.clear()
    fewer = sample(most)
    assert sum(told) == 3 * len(PROMPTS) and max(drawn) > most
    assert [each.tokens for each in fewer] == [each.tokens for each in whole]
    for ours, theirs in zip(fewer, whole, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert ours.tokens.source == theirs.row.source


def test_a_response_that_does_not_fit_ends_sampling_in_one_line() -> None:
    model = llama()
    way_of(model)
    fits_slots(model, 13)

    def full(module: Any, args: Any) -> None:
        raise MemoryError

    model.model.register_forward_pre_hook(full)
    with pytest.raises(RunError, match="sampling.*: 1 sequence x 13 = 13 padded tokens"):
        prompts = [(Prompt("p"), ids) for ids in PROMPTS]
        rollouts(model, Encoder(bpe(), data_of()), prompts, Sampling(6), samples=2, budget=999)


@pytest.mark.parametrize(
    "sampling", [Sampling(4), Sampling(4, temperature=0), Sampling(4, top_k=3)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_the_run(sampling: Sampling, bad: float) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7, 3] = bad
    with pytest.raises(RunError, match=r"logits are not finite: its weight lm_head\.weight is not"):
        run(model, sampling)


def test_an_overflow_while_sampling_names_no_weight() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    with pytest.raises(RunError, match="its activations overflow"):
        run(model, Sampling(4))
