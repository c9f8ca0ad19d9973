"""Ids of texts over families of tokenizers: boundaries, special tokens in rows, long texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.text_ids import TextIds
from tests.families import FAMILIES, family

PIECES = [
    "Hello",
    " Ann",
    "!",
    "\n",
    " ",
    "  ",
    ":",
    "User",
    "12",
    " 3",
    "中",
    "é",
    "'s",
    ".",
    "<|end|>",
]
WRITTEN = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
PREFIXED = ("roberta", "llama2", "llama2_legacy", "t5")

IDS = {name: TextIds(family(name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
@given(prompt=WRITTEN, response=WRITTEN)
@settings(max_examples=60)
def test_a_response_has_the_ids_that_the_joined_text_has(
    name: str, prompt: str, response: str
) -> None:
    """Where the joined text begins with the prompt's ids, the response's are the others of it."""
    ids = IDS[name]
    alone, joined = ids.of_each([prompt, prompt + response])
    (found,) = ids.continued([prompt], [response], None)
    if joined[: len(alone)] == alone:
        assert alone + found == joined


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "llama2_legacy"])
@given(prompt=WRITTEN, response=WRITTEN)
@settings(max_examples=60)
def test_prompt_and_response_are_the_text_again(name: str, prompt: str, response: str) -> None:
    """No blank comes between them, wherever the boundary is."""
    ids = IDS[name]
    prompt = f"a{prompt}"  # what a decoder makes of a blank at the start is its own matter
    (alone,) = ids.of_each([ids.hide(prompt)])
    (found,) = ids.continued([ids.hide(prompt)], [ids.hide(response)], None)
    text = family(name).decode(alone + found, clean_up_tokenization_spaces=False)
    assert text == prompt + response


def test_a_reply_after_a_blank_gains_no_blank() -> None:
    """The joined text is ':', '▁Hello': apart, the reply begins with H, and is not '▁Hello'."""
    for name in ("llama2", "llama2_legacy"):
        ids, tokens = IDS[name], family(name).convert_ids_to_tokens
        (found,) = ids.continued(["Assistant: "], ["Hello"], None)
        assert tokens(found)[0][0] == "H"
        assert tokens(ids.of("Hello"))[0][0] == "▁"
        (found,) = ids.continued(["Assistant:"], [" Hello"], None)
        assert tokens(found)[0][0] == "▁"
    (found,) = IDS["gpt2"].continued(["Assistant:"], [" Hello"], None)
    assert family("gpt2").convert_ids_to_tokens(found)[0][0] == "Ġ"


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_rows_are_text(name: str) -> None:
    """Those of a template stay tokens, and the text around is tokenised as it always is."""
    ids, tokenizer = IDS[name], family(name)
    end, close = (tokenizer.convert_tokens_to_ids(each) for each in ("<|end|>", "</s>"))
    told = "say <|end|> or </s> now"
    assert ids.spelt([{"content": told}, "<s>", 3, None]) == 3
    (plain,) = ids.of_each([ids.hide(told)])
    assert not {end, close} & set(plain)
    assert tokenizer.unk_token_id not in plain or name in ("t5", "bert")  # no bytes, few letters
    (mixed,) = ids.of_each([ids.hide(told) + "<|end|>"])
    assert mixed[-1] == end and mixed[: len(plain)] == plain
    assert ids.of_each([told])[0].count(end) == 1
    assert ids.of_each([ids.hide("none here")]) == ids.of_each(["none here"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("limit", [1, 7, 40])
def test_a_long_text_has_the_same_first_and_last_ids(name: str, limit: int) -> None:
    ids = IDS[name]
    texts = [
        " ".join(f"Once upon a time {i}, the 中文 bird's" for i in range(400)),
        "x" * 5000,  # no place to cut it at
        "short",
        "a b " * 300 + "\n\n" * 2000,
    ]
    for text, head, end in zip(texts, ids.heads(texts, limit), ids.ends(texts, limit), strict=True):
        (whole,) = ids.of_each([text])
        assert head[:limit] == whole[:limit] and end[-limit:] == whole[-limit:]
        assert (len(head) > limit) == (len(end) > limit) == (len(whole) > limit)
    assert len(ids.heads(texts, limit)[0]) < len(ids.of(texts[0])) / 2


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "llama2_legacy"])
def test_a_mask_marks_the_tokens_of_its_characters(name: str) -> None:
    ids, tokenizer = IDS[name], family(name)
    text = "<|user|>Hello Ann<|assistant|>" + ids.hide("I </s> sing") + "<|end|><|user|>On"
    start = text.index("I ")
    found, inside = ids.with_mask(text, [(start, text.index("<|end|>") + len("<|end|>"))])
    assert found == ids.of(text)
    marked = [id for id, each in zip(found, inside, strict=True) if each]
    said = str(tokenizer.decode(marked, clean_up_tokenization_spaces=False)).strip()
    assert said.replace(" ", "") == "I</s>sing<|end|>"
    assert inside.index(True) == found.index(IDS[name].control["<|assistant|>"]) + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_tokenizer_puts_before_a_text(name: str) -> None:
    assert IDS[name].before == [family(name).bos_token_id]
    assert TextIds(family(name, bos=False)).before == []
