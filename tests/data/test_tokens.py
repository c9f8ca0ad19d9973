"""Tokenising: one BOS, one EOS, the same prompt ids in every role, limits that are told."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.kinds import Demonstration, Preference, Prompt, Text
from rlhf_cli.data.tokens import Encoder
from tests.toys import CHAT, bpe, characters, data_of

TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on"},
]


def encoder_of(tokenizer: PreTrainedTokenizerFast | None = None, **data: Any) -> Encoder:
    return Encoder(tokenizer or bpe(), data_of(**data))


CASES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], dict[str, Any], Any]] = {
    "plain": (bpe, {}, "the cat"),
    "template": (bpe, {"template": "Q: {prompt}\nA: "}, "the cat"),
    "chat": (lambda: bpe(chat=True), {"template": "chat"}, "the cat"),
    "dialogue": (lambda: bpe(chat=True), {}, TURNS),
    "no BOS": (characters, {}, "abcd"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_has_the_same_ids_in_every_role(name: str) -> None:
    make, data, prompt = CASES[name]
    encoder = encoder_of(make(), **data)
    reply, other = ("efg", "hi") if name == "no BOS" else ("sat on a mat", "ran")
    sampled = encoder.prompts([Prompt(prompt)])[1][0]
    shown = encoder.demonstrations([Demonstration(prompt, reply)])[0]
    (pair,) = encoder.answers([Preference(prompt, reply, other)])
    chosen, rejected = pair.sequences
    assert sampled == shown.prompt == pair.prompt
    assert shown == chosen
    tokenizer = encoder.tokenizer
    for tokens in (shown, chosen, rejected):
        ids = tokens.prompt + tokens.response
        bos = tokenizer.bos_token_id
        assert ids.count(bos) == (bos is not None) and (bos is None or ids[0] == bos)
        ends = [place for place, id in enumerate(tokens.response) if id in encoder.stop_ids]
        assert ends == [len(tokens.response) - 1]
        assert tokenizer.pad_token_id not in ids
    assert encoder.text(shown.response).strip() == reply
    assert encoder.notes() == []


def test_a_worked_row() -> None:
    encoder = encoder_of(characters(), template="{prompt}b")  # id = ord - 90: a is 7
    (tokens,) = encoder.demonstrations([Demonstration("a", "cd")])
    assert (tokens.prompt, tokens.response) == ([7, 8], [9, 10, 1])
    batch = collate([tokens])
    assert batch.response.tolist() == [[False, False, True, True, True]]


def test_no_token_straddles_the_boundary() -> None:
    """Joined, the tokenizer would merge 't' + 'he' into one token."""
    encoder = encoder_of()
    joined = encoder.tokenizer("the cat").input_ids
    apart = encoder.demonstrations([Demonstration("t", "he cat")])[0]
    assert apart.prompt + apart.response[:-1] != joined
    assert encoder.tokenizer.decode(apart.prompt[1:]) == "t"
    assert encoder.text(apart.response) == "he cat"


def test_chat_follows_the_tokenizers_template() -> None:
    tokenizer = bpe(chat=True)
    encoder = encoder_of(tokenizer, template="chat")
    (tokens,) = encoder.demonstrations([Demonstration("the cat", "sat")])
    whole = tokenizer.decode(tokens.prompt + tokens.response)
    assert whole == "<s><|user|>the cat<|end|><|assistant|>sat<|end|>"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokens.response[-1] == encoder.end_of_turn == end
    assert encoder.stop_ids == sorted([tokenizer.eos_token_id, end])
    dialogue = encoder.prompts([Prompt(TURNS)])[1][0]
    assert tokenizer.decode(dialogue).count("<|assistant|>") == 2


def test_a_template_that_writes_the_bos_itself_gives_one() -> None:
    tokenizer = bpe(chat=True)
    tokenizer.chat_template = "<s>" + CHAT
    (ids,) = encoder_of(tokenizer, template="chat").prompts([Prompt("the cat")])[1]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_templates_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="has no chat template"):
        encoder_of(template="chat")
    with pytest.raises(UserError, match="has no chat template"):
        encoder_of().prompts([Prompt(TURNS)])
    rewriting = bpe(chat=True)
    rewriting.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(UserError, match="rewrites the prompt when a reply follows"):
        encoder_of(rewriting, template="chat").demonstrations([Demonstration("a", "b")])
    endless = characters()
    endless.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        encoder_of(endless)


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_cut_response_is_never_empty_and_is_told(limit: int) -> None:
    encoder = encoder_of(characters(), max_response_tokens=limit)
    (tokens,) = encoder.demonstrations([Demonstration("a", "bcd")])
    assert tokens.response == [8, 9, 10, 1][:limit]
    told = [] if limit == 4 else ["1 responses cut to max_response_tokens (their EOS is lost)"]
    assert encoder.notes() == told
    assert encoder.notes() == []  # once


def test_long_prompts() -> None:
    rows = [Prompt("abcdef", source="f:1"), Prompt("ab", source="f:2")]
    cut = encoder_of(characters(), max_prompt_tokens=3, long_prompts="cut")
    assert cut.prompts(rows)[1] == [[10, 11, 12], [7, 8]]  # the end holds the question
    assert cut.notes() == ["1 prompts over max_prompt_tokens: cut"]
    drop = encoder_of(characters(), max_prompt_tokens=3, long_prompts="drop")
    assert drop.prompts(rows) == ([rows[1]], [[7, 8]])
    assert drop.notes() == ["1 prompts over max_prompt_tokens: drop"]
    stop = encoder_of(characters(), max_prompt_tokens=3, long_prompts="error")
    with pytest.raises(UserError, match="f:1: the prompt has 6 tokens, the limit is 3"):
        stop.prompts(rows)
    with pytest.raises(UserError, match="every prompt"):
        drop.prompts(rows[:1])


def test_a_cut_prompt_keeps_its_bos() -> None:
    encoder = encoder_of(max_prompt_tokens=4, long_prompts="cut")
    whole = encoder_of().prompts([Prompt("the cat sat on a mat")])[1][0]
    (ids,) = encoder.prompts([Prompt("the cat sat on a mat")])[1]
    assert ids == whole[:1] + whole[-3:]


def test_of_plain_text_every_token_is_trained() -> None:
    encoder = encoder_of()
    (tokens,) = encoder.demonstrations([Text("the cat")])
    assert tokens.prompt == [encoder.tokenizer.bos_token_id]
    assert encoder.text(tokens.response) == "the cat"
    assert tokens.response[-1] == encoder.tokenizer.eos_token_id
    bare = encoder_of(characters(), max_prompt_tokens=1, max_response_tokens=2)
    assert bare.texts([Text("abcdef")])[0].prompt == [7]  # nothing can predict the first token
    assert bare.texts([Text("abcdef")])[0].response == [8, 9]
    assert bare.notes() == ["2 texts cut to max_prompt_tokens + max_response_tokens"]
