"""Tokenising: one BOS, one EOS, the same prompt ids in every role, limits that are told."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Answers
from rlhf_cli.data.kinds import Demonstration, Preference, Prompt, Stepwise, Text, cut_steps
from rlhf_cli.data.step_cutter import StepCutter
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
    sampled = encoder.prompts([Prompt(prompt)])[0][1]
    learn_from = 0 if isinstance(prompt, str) else len(prompt)
    shown = encoder.demonstrations([Demonstration(prompt, reply, learn_from=learn_from)])[0]
    (pair,) = encoder.answers([Preference(prompt, reply, other)])
    chosen, rejected = pair.sequences
    assert sampled == shown.prompt == pair.prompt
    assert shown == chosen
    tokenizer = encoder.tokenizer
    for tokens in (shown, chosen, rejected):
        ids = tokens.prompt + tokens.response
        bos = tokenizer.bos_token_id
        has_one = bos is not None and name not in ("chat", "dialogue")  # whose template has none
        assert ids.count(bos) == has_one and (not has_one or ids[0] == bos)
        ends = [place for place, id in enumerate(tokens.response) if id in encoder.stop_ids]
        assert ends == [len(tokens.response) - 1]
        assert tokenizer.pad_token_id not in ids
    assert encoder.text(shown.response).strip() == reply
    told = ["1 earlier replies of dialogues carry no loss: a row judges its last reply"]
    assert encoder.notes() == (told if name == "dialogue" else [])


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
    assert whole == "<|user|>the cat<|end|><|assistant|>sat<|end|>"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokens.response[-1] == encoder.end_of_turn == end
    assert encoder.stop_ids == sorted([tokenizer.eos_token_id, end])
    dialogue = encoder.prompts([Prompt(TURNS)])[0][1]
    assert tokenizer.decode(dialogue).count("<|assistant|>") == 2


def test_a_template_that_writes_the_bos_itself_gives_one() -> None:
    tokenizer = bpe(chat=True)
    tokenizer.chat_template = "<s>" + CHAT
    ((_, ids),) = encoder_of(tokenizer, template="chat").prompts([Prompt("the cat")])
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
    assert [ids for _, ids in cut.prompts(rows)] == [
        [10, 11, 12],
        [7, 8],
    ]  # the end holds the question
    assert cut.notes() == ["1 prompts over max_prompt_tokens: cut"]
    drop = encoder_of(characters(), max_prompt_tokens=3, long_prompts="drop")
    assert drop.prompts(rows) == [(rows[1], [7, 8])]
    assert drop.notes() == ["1 prompts over max_prompt_tokens: drop"]
    stop = encoder_of(characters(), max_prompt_tokens=3, long_prompts="error")
    with pytest.raises(UserError, match="f:1: the prompt has 6 tokens, the limit is 3"):
        stop.prompts(rows)
    fresh = encoder_of(characters(), max_prompt_tokens=3, long_prompts="drop")
    assert fresh.prompts(rows[:1]) == []
    with pytest.raises(UserError, match="f:1: nothing is left of 1 rows: a prompt is .*=3"):
        fresh.check_lengths()
    drop.check_lengths()


def test_a_cut_prompt_keeps_its_bos() -> None:
    encoder = encoder_of(max_prompt_tokens=4, long_prompts="cut")
    whole = encoder_of().prompts([Prompt("the cat sat on a mat")])[0][1]
    ((_, ids),) = encoder.prompts([Prompt("the cat sat on a mat")])
    assert ids == whole[:1] + whole[-3:]


def test_of_plain_text_every_token_is_trained() -> None:
    encoder = encoder_of()
    (tokens,) = encoder.demonstrations([Text("the cat")])
    assert tokens.prompt == [encoder.tokenizer.bos_token_id]
    assert encoder.text(tokens.response) == "the cat"
    assert tokens.response[-1] == encoder.tokenizer.eos_token_id
    bare = encoder_of(characters(), max_prompt_tokens=1, max_response_tokens=2)
    made = bare.texts([Text("abcdef")])
    # nothing can predict the first token; each other one is predicted once
    assert [each.prompt for each in made] == [[7], [9], [11]]
    assert [each.response for each in made] == [[8, 9], [10, 11], [12, 1]]
    assert bare.notes() == ["1 texts of more than 3 tokens cut into several sequences"]
    assert len(bare.texts([Text("ab")])) == 1  # 3 tokens fit


# --------------------------------------------------------------------------- steps


def pieces(*texts: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 1, 2, ... are these texts and nothing else; EOS is 0."""
    vocabulary = {"</s>": 0} | {text: id for id, text in enumerate(texts, 1)} | {"a": 99}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: a space is in front of a word, what is unknown falls back to bytes."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz."]
    merges = [("\u2581", "t"), ("o", "n"), ("on", "e"), ("\u2581t", "w"), (".", "\u2581")]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    names += ["".join(pair) for pair in merges]
    vocabulary = {name: id for id, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


SENTENCE = "(?<=[.!?]) "


@pytest.mark.parametrize(
    ("texts", "step_end", "ends"),
    [
        (["one", "\n", "two"], "\n", [1, 3]),
        (["one", "two"], "\n", [2]),
        (["one", "\n", "two", "\n"], "\n", [1, 4]),  # what follows the last end is no step
        (["one", ".\n", "tw", "o.\nth", "ree"], "\n", [1, 3, 5]),  # ends within tokens
        (["one\ntwo\nthree", "."], "\n", [0, 0, 2]),  # two ends in one token
        (["one", "\n", "\n", "two"], "\n\n", [2, 4]),  # an end of several tokens
        (["one", "\n", "two\n", "\nthree"], "\n\n", [2, 4]),  # a blank before the next step
        (["one", "\n", "\n", "\n", "two"], "\n", [3, 5]),  # blanks belong to the step before
        (["\n", "one", "\n", "two"], "\n", [2, 4]),  # or to the first one
        (["Step", " 1", ": x", " Step", " 2", ": y"], r" (?=Step \d)", [2, 6]),
        (["One", ".", " ", "Two", "."], SENTENCE, [2, 5]),
    ],
)
def test_where_steps_end(texts: list[str], step_end: str, ends: list[int]) -> None:
    tokenizer = pieces(*dict.fromkeys(texts))
    ids = [1 + list(dict.fromkeys(texts)).index(text) for text in texts]
    assert StepCutter(tokenizer, step_end).ends([*ids, 0]) == ends


def test_an_end_is_no_part_of_the_next_step() -> None:
    """Tokenizers put a space before the word that it precedes; that word is read too late."""
    tokenizer = pieces("One", ".", " Two")
    assert StepCutter(tokenizer, SENTENCE).ends([1, 2, 3, 2, 0]) == [1, 4]


TOKENIZERS = {"byte-level": bpe, "sentencepiece": sentencepiece}
WRITTEN = st.lists(
    st.sampled_from(["one", "two", "tone", ".", " ", "  ", "\n", "\n\n", "a"]), min_size=1
).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=WRITTEN, step_end=st.sampled_from(["\n", "\n\n", r"\.", r"\n+|\. "]))
def test_each_step_ends_with_its_last_character(name: str, text: str, step_end: str) -> None:
    """The tokens up to an end hold that step whole, and without the last of them they do not."""
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ends = StepCutter(tokenizer, step_end).ends([*ids, tokenizer.eos_token_id])
    steps = cut_steps(text, step_end)
    assert ends[-1] == len(ids) and len(ends) == max(len(steps), 1)
    written = ""
    for end, step in zip(ends, steps[:-1], strict=False):
        written += step
        without, so_far = (str(tokenizer.decode(ids[:n])).lstrip(" ") for n in (end, end + 1))
        # a blank that ends a step may be a token, or part of the next word's
        assert so_far.startswith(written.strip(" ")) and not without.startswith(written.lstrip(" "))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_steps_of_a_row_have_their_labels(name: str) -> None:
    encoder = encoder_of(TOKENIZERS[name](), step_join="\n\n", step_end="\n\n")
    row = Stepwise("p", ["one two", "three\nfour", "five"], [1, 0, 0.5])
    (item,) = encoder.answers([row])
    (response,) = item.responses
    shown = [encoder.text(response[: end + 1]).strip() for end in item.ends]
    assert shown == ["one two", "one two\n\nthree\nfour", "one two\n\nthree\nfour\n\nfive"]
    assert response[-1] == encoder.tokenizer.eos_token_id


@pytest.mark.parametrize("limit", [2, 4, 5, 7, 8, 9, 10])
def test_a_step_that_is_cut_has_no_end(limit: int) -> None:
    """Of "ab|cd|ef" one character is a token; a row without a whole step is dropped and told."""
    encoder = encoder_of(
        characters(), step_join="|", step_end=r"\|", max_response_tokens=limit, max_prompt_tokens=9
    )
    rows = [Stepwise("a", ["ab", "cd", "ef"], [1, 1, 0]), Stepwise("a", ["b"], [1])]
    found = encoder.answers(rows)
    assert found[-1] == Answers([7], [[8, 1]], rows[1], [1])
    expected = {2: [], 4: [2], 5: [2], 7: [2, 5], 8: [2, 5]}.get(limit, [2, 5, 8])
    assert [item.ends for item in found[:-1]] == ([expected] if expected else [])
    dropped = "1 responses whose first step exceeds max_response_tokens: drop"
    assert (dropped in encoder.notes()) == (not expected)


def test_no_whole_step_at_all_is_no_matter_of_prompts() -> None:
    encoder = encoder_of(characters(), step_join="|", step_end=r"\|", max_response_tokens=2)
    assert encoder.answers([Stepwise("a", ["ab", "cd"], [1, 1])]) == []
    with pytest.raises(UserError, match="first step .* data.max_response_tokens=2"):
        encoder.check_lengths()


@pytest.mark.parametrize("end", ["\u3002", "\U0001f600", "<step>"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_steps_have_all_of_their_labels_or_none(name: str, end: str) -> None:
    """Bytes of one character are put together; a special token is no text, so it is refused."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<step>"]})
    encoder = encoder_of(tokenizer, step_join=end, step_end=end, special_tokens="keep")
    row = Stepwise("p", ["one", "two", "three"], [1, 0, 1], "f:1")
    if end == "<step>":
        with pytest.raises(UserError, match="f:1: .* loses what ends a step: 1 of 3 steps"):
            encoder.answers([row])
        return
    (item,) = encoder.answers([row])
    shown = [encoder.text(item.responses[0][: place + 1]).strip() for place in item.ends]
    assert shown == [f"one{end}", f"one{end}two{end}", f"one{end}two{end}three"]


def test_steps_that_are_cut_elsewhere_are_refused() -> None:
    """The same number of steps is not the same steps."""
    encoder = encoder_of(step_join="", step_end=" ")
    with pytest.raises(UserError, match="f:1: these 2 steps, .* are not those that"):
        encoder.answers([Stepwise("p", ["one two", "three"], [1, 0], "f:1")])


def test_every_sequence_knows_its_row() -> None:
    """Of demonstrations, texts, judgements and responses that come as text alike."""
    encoder = Encoder(bpe(), data_of())
    made = encoder.demonstrations([Demonstration("the cat", "sat", "d:1"), Text("a mat", "t:1")])
    made += encoder.answers([Preference("the dog", "ran", "sang", "p:1")])[0].sequences
    made += encoder.written([Prompt("a", source="q:1")], ["b"], [True])
    assert [each.source for each in made] == ["d:1", "t:1", "p:1", "p:1", "q:1"]
