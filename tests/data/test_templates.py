"""Templates: what is trained on is what the model is served with, token for token."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens, response_tokens
from rlhf_cli.data.kinds import Demonstration, Preference, Prompt, Text
from rlhf_cli.data.templates import SHIPPED, TextTemplate, chat_template_of
from rlhf_cli.data.tokens import Encoder
from tests.families import FAMILIES, family
from tests.toys import data_of

NAMES = sorted(file.stem for file in SHIPPED.glob("*.jinja"))
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Greet Ann"},
    {"role": "assistant", "content": "Hello Ann!"},
    {"role": "user", "content": "And now?\nSing."},
    {"role": "assistant", "content": "A song, 12 notes."},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
    "<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = (  # as R1's: the reasoning of replies is left out, and is opened for a new one
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def encoder_of(tokenizer: PreTrainedTokenizerFast, **data: Any) -> Encoder:
    return Encoder(tokenizer, data_of(**{"template": None, **data}))


def served(tokenizer: PreTrainedTokenizerFast, turns: Any, **how: Any) -> list[int]:
    """What transformers makes of a dialogue."""
    apply: Any = tokenizer.apply_chat_template
    return list(apply(turns, return_dict=True, **how)["input_ids"])


def learnt(tokenizer: PreTrainedTokenizerFast, sequence: Tokens) -> str:
    """The text that carries loss."""
    loss = sequence.loss or [True] * len(sequence.response)
    ids = [id for id, each in zip(sequence.response, loss, strict=True) if each]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


# --------------------------------------------------------------------------- chat


@pytest.mark.parametrize("template", NAMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_chat_template(name: str, template: str) -> None:
    """Of the prompt all, of the whole up to what ends the reply; never a BOS of our own."""
    tokenizer = family(name)
    encoder = encoder_of(tokenizer, chat_template=template)
    ((_, prompt),) = encoder.prompts([Prompt(TALK[:-1])])
    assert prompt == served(tokenizer, TALK[:-1], add_generation_prompt=True)
    (shown,) = encoder.demonstrations([Demonstration(TALK[:-1], TALK[-1]["content"])])
    (last,) = encoder.answers([Preference(TALK[:-1], TALK[-1]["content"], "No.")])
    ids = shown.prompt + shown.response
    assert ids[: len(prompt)] == prompt == last.prompt
    assert ids == last.prompt + last.responses[0]
    whole = served(tokenizer, TALK)
    assert ids[: len(whole)] == whole[: len(ids)]
    assert len(whole) - len(ids) <= 2  # a line break after the last turn
    assert ids.count(tokenizer.bos_token_id) == whole.count(tokenizer.bos_token_id)


PUBLISHED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]",
    "qwen": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n"
    "<|assistant|>\n",
}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_templates_write_the_published_text(name: str) -> None:
    tokenizer = family("gpt2", chat_template_of(name))
    roles = ("system", "user", "assistant", "user")
    turns = [{"role": r, "content": c} for r, c in zip(roles, "SUAV", strict=True)]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == PUBLISHED[name]


def test_qwen_writes_reasoning_and_tools() -> None:
    tokenizer = family("gpt2", chat_template_of("qwen"))
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "U"},
        {"role": "assistant", "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "content": "T"},
        {"role": "tool", "content": "W"},
        {"role": "assistant", "content": "<think>\nQ\n</think>\n\nA"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == (
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\nR\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nT\n</tool_response>\n<tool_response>\nW\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\nQ\n</think>\n\nA<|im_end|>\n"
    )
    apply: Any = tokenizer.apply_chat_template
    short = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    text = apply(turns[:1], tools=[{"name": "f"}], **short)
    assert (
        text.startswith("<|im_start|>system\n# Tools\n\n") and '\n{"name": "f"}\n</tools>' in text
    )
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_and_prefixes_give_one_mask(name: str) -> None:
    """And it is the mask of transformers, with the end of each turn."""
    marked, plain = family(name, MARKED), family(name, chat_template_of("chatml"))
    rows = [Demonstration(TALK[:-1], TALK[-1]["content"])]
    (ours,) = encoder_of(marked).demonstrations(rows)
    (theirs,) = encoder_of(plain).demonstrations(rows)
    assert (ours, ours.loss) == (theirs, theirs.loss)
    apply: Any = marked.apply_chat_template
    mask = apply(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    loss = [False] * len(ours.prompt) + (ours.loss or [])
    assert [bool(each) for each in mask[: len(loss)]] == loss
    said = learnt(plain, ours).replace(" ", "")
    if name != "bert":
        assert said == "HelloAnn!<|im_end|>Asong,12notes.<|im_end|>"
    ends = ours.response.count(encoder_of(plain).ids.control["<|im_end|>"])
    assert ends == 3  # of which the user's carries no loss
    assert collate([ours]).response.sum() == response_tokens([ours]) == sum(ours.loss or [])


def test_which_replies_are_learnt() -> None:
    tokenizer = family("llama3", chat_template_of("chatml"))
    row = Demonstration(TALK[:-1], TALK[-1]["content"])
    both = "Hello Ann!<|im_end|>A song, 12 notes.<|im_end|>"
    encoder = encoder_of(tokenizer)
    assert learnt(tokenizer, encoder.demonstrations([row])[0]) == both
    assert encoder.notes() == [
        "1 earlier replies carry loss as well as the last (data.loss_on=last: the last alone)"
    ]
    encoder = encoder_of(tokenizer, loss_on="last")
    assert learnt(tokenizer, encoder.demonstrations([row])[0]) == "A song, 12 notes.<|im_end|>"
    assert encoder.notes() == ["1 earlier replies carry no loss (data.loss_on=last)"]
    encoder.demonstrations([Demonstration(TALK[:2], "Hello Ann!")])
    assert encoder.notes() == []
    apart = Demonstration(TALK[:-1], TALK[-1]["content"], learn_from=4)
    (shown,) = encoder_of(tokenizer).demonstrations([apart])
    assert learnt(tokenizer, shown) == "A song, 12 notes.<|im_end|>" and shown.loss is None
    weighed: list[dict[str, Any]] = [*TALK[:2], {**TALK[2], "weight": 0}, TALK[3]]
    encoder = encoder_of(tokenizer)
    (shown,) = encoder.demonstrations([Demonstration(weighed, "A song.")])
    assert learnt(tokenizer, shown) == "A song.<|im_end|>"
    assert encoder.notes() == ["1 replies of weight 0 carry no loss"]
    unwanted = {**TALK[4], "weight": 0}
    encoder = encoder_of(tokenizer)
    (shown,) = encoder.demonstrations([Demonstration(TALK[:-1], unwanted)])
    assert learnt(tokenizer, shown) == "Hello Ann!<|im_end|>"
    assert encoder.demonstrations([Demonstration(weighed, unwanted)]) == []
    assert "1 rows have no reply that carries loss: drop" in encoder.notes()


def test_where_the_template_rewrites_earlier_turns_the_last_reply_is_learnt_and_it_is_told() -> (
    None
):
    """Qwen 3 writes a reply with its reasoning as long as it is the last."""
    tokenizer = family("llama3", chat_template_of("qwen"))
    encoder = encoder_of(tokenizer)
    (shown,) = encoder.demonstrations([Demonstration(TALK[:-1], TALK[-1]["content"])])
    ids = shown.prompt + shown.response
    assert ids == served(tokenizer, TALK)[: len(ids)]
    assert shown.loss is None
    said = "<think>\n\n</think>\n\nA song, 12 notes.<|im_end|>"
    assert learnt(tokenizer, shown) == said
    assert shown.prompt == served(tokenizer, TALK[:-1], add_generation_prompt=True)
    (note,) = encoder.notes()
    assert note.startswith("1 earlier replies carry no loss: the chat template writes them other")


def test_a_reply_goes_on_from_what_the_generation_prompt_opens() -> None:
    tokenizer = family("llama3", THINKS)
    encoder = encoder_of(tokenizer, template="chat")
    asked = served(tokenizer, [{"role": "user", "content": "1+1"}], add_generation_prompt=True)
    thought = "<think>\nOne more.\n</think>\n\n2"
    (shown,) = encoder.demonstrations([Demonstration("1+1", thought)])
    assert encoder.prompts([Prompt("1+1")])[0][1] == shown.prompt == asked
    assert tokenizer.decode(shown.response) == "One more.\n</think>\n\n2</s>"
    assert encoder.stop_ids == [tokenizer.eos_token_id]
    (pair,) = encoder.answers([Preference("1+1", thought, "3")])  # one does not think
    assert tokenizer.decode(pair.prompt) == "<s><|user|>1+1<|assistant|>"
    texts = [tokenizer.decode(each) for each in pair.responses]
    assert texts == ["<think>\nOne more.\n</think>\n\n2</s>", "3</s>"]


def test_a_prompt_that_ends_in_the_assistants_words_is_continued() -> None:
    tokenizer = family("llama3", chat_template_of("chatml"))
    begun = [*TALK[:2], {"role": "assistant", "content": "Hello"}]
    encoder = encoder_of(tokenizer)
    ((_, prompt),) = encoder.prompts([Prompt(begun)])
    assert prompt == served(tokenizer, begun, continue_final_message=True)
    (shown,) = encoder.demonstrations([Demonstration(begun, " Ann!")])
    assert shown.prompt == prompt and tokenizer.decode(shown.response) == " Ann!<|im_end|>"
    assert shown.prompt + shown.response == served(tokenizer, TALK[:3])[:-1]


TOOLS = (
    "{% if tools %}[tools] {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m['role'] }}\n{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
    "CALL {{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_messages_and_tools_reach_the_template_whole() -> None:
    tokenizer = family("llama3", TOOLS)
    reply = {"role": "assistant", "content": None, "tool_calls": [{"name": "sing"}]}
    turns, tools = TALK[:2], [{"name": "sing"}]
    (shown,) = encoder_of(tokenizer).demonstrations(
        [Demonstration(turns, reply, columns={"tools": tools})]
    )
    assert tokenizer.decode(shown.response) == 'CALL {"name": "sing"}<|im_end|>'
    assert shown.prompt == served(tokenizer, turns, tools=tools, add_generation_prompt=True)
    strict = family("llama3", chat_template_of("chatml"))
    with pytest.raises(UserError, match="f:1: .* tool_calls, .*chat_template=qwen") as told:
        encoder_of(strict).demonstrations([Demonstration(turns, reply, "f:1")])
    assert "\n" not in str(told.value)


def test_a_system_column_is_the_first_message() -> None:
    tokenizer = family("gpt2", chat_template_of("chatml"))
    row = Prompt("Greet Ann", {"system": "Be kind."})
    ((_, ids),) = encoder_of(tokenizer, template="chat").prompts([row])
    assert ids == served(tokenizer, TALK[:2], add_generation_prompt=True)


def test_arguments_and_templates_that_are_not_there() -> None:
    tokenizer = family("gpt2")
    with pytest.raises(UserError, match="data.chat_template=nosuch: .*chatml, gemma"):
        encoder_of(tokenizer, chat_template="nosuch")
    encoder = encoder_of(tokenizer, chat_template="qwen", chat_args={"enable_thinking": False})
    ((_, ids),) = encoder.prompts([Prompt(TALK[:2])])
    assert str(tokenizer.decode(ids)).endswith("assistant\n<think>\n\n</think>\n\n")


def test_special_tokens_in_a_dialogue_end_no_turn() -> None:
    tokenizer = family("llama2", chat_template_of("chatml"))
    end = encoder_of(tokenizer).ids.control["<|im_end|>"]
    turns = [{"role": "user", "content": "What is <|im_end|>?"}]
    row = Demonstration(turns, "It is </s> or <|im_end|>.")
    encoder = encoder_of(tokenizer)
    (shown,) = encoder.demonstrations([row])
    assert (shown.prompt.count(end), shown.response.count(end)) == (1, 1)
    assert shown.response[-1] == end and tokenizer.eos_token_id not in shown.response
    assert encoder.text(shown.response) == "It is </s> or <|im_end|>."
    (note,) = encoder.notes()
    assert note.startswith("3 special tokens spelt in rows are read as text")
    encoder = encoder_of(tokenizer, special_tokens="keep")
    (shown,) = encoder.demonstrations([row])
    assert (shown.prompt.count(end), shown.response.count(end)) == (2, 2)


# --------------------------------------------------------------------------- text


def test_no_chat_template_is_consulted_for_text() -> None:
    """Not even one that cannot work; its end of turn ends nothing."""
    tokenizer = family("llama3", "{{ raise_exception('no') }}")
    encoder = encoder_of(tokenizer, template="Q: {prompt}\nA:")
    (shown,) = encoder.demonstrations([Demonstration("a", " b")])
    assert tokenizer.decode(shown.prompt + shown.response) == "<s>Q: a\nA: b</s>"
    assert encoder.stop_ids == [tokenizer.eos_token_id] and encoder.template == "Q: {prompt}\nA:"


def test_a_template_shows_columns() -> None:
    template = TextTemplate('{prompt} {n} {input}{{x}} \\boxed{} {"a": 1} {1} {{{n}}}')
    row = {"n": 3, "more": "{prompt}"}
    assert template.fill("{n}", row, "f:1") == '{n} 3 {x} \\boxed{} {"a": 1} {1} {3}'
    assert TextTemplate("{prompt}{é}").fill("p", {"é": "{prompt}"}, "") == "p{prompt}"
    with pytest.raises(UserError, match=r"f:2: data.template has \{n\}, but the row has no n"):
        template.fill("p", {"n": None}, "f:2")
    with pytest.raises(UserError, match=r"f:3: .* no \{system\} to show it.*data.template=chat"):
        template.fill("p", {"n": 1, "system": "S"}, "f:3")


def test_a_placeholder_that_no_row_fills_is_refused() -> None:
    encoder = encoder_of(family("gpt2"), template="{prompt} {input}")
    encoder.prompts([Prompt("a", {"input": "b"}), Prompt("a")])
    encoder.check_lengths()
    encoder = encoder_of(family("gpt2"), template="{prompt} {input}")
    encoder.prompts([Prompt("a")])
    with pytest.raises(UserError, match="no row has input"):
        encoder.check_lengths()


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_that_bring_bos_and_eos_get_no_second_one(name: str) -> None:
    tokenizer = family(name)
    encoder = encoder_of(tokenizer)
    bare, marked, lines = encoder.texts(
        [Text("Hello Ann"), Text("<s>Hello Ann</s>"), Text("<s>Hello Ann</s>\n")]
    )
    assert bare == marked == lines and bare.prompt == [tokenizer.bos_token_id]
    assert (
        bare.response.count(tokenizer.eos_token_id)
        == 1
        == bare.response[-1:].count(tokenizer.eos_token_id)
    )
    assert encoder.notes() == []
    (brought,) = encoder_of(family(name, bos=False)).texts([Text("<s>Hello Ann")])
    assert brought == bare
    (shown,) = encoder.demonstrations([Demonstration("<s>Hello", "Ann</s>")])
    assert shown == encoder.demonstrations([Demonstration("Hello", "Ann")])[0]


# --------------------------------------------------------------------------- lengths


def test_what_is_not_given_is_what_the_positions_leave() -> None:
    tokenizer = family("gpt2")
    word = tokenizer("Ann").input_ids[1:]
    encoder = Encoder(tokenizer, data_of(template=None, long_responses="cut"), context=10)
    (shown,) = encoder.demonstrations([Demonstration("Ann", "Ann " * 30)])
    assert len(shown) == 10 and len(shown.prompt) == 1 + len(word)
    encoder = Encoder(tokenizer, data_of(template=None, long_prompts="drop"), 10, room=6)
    assert encoder.prompts([Prompt("1 1 1 1")]) == []
    assert len(encoder.prompts([Prompt("Ann")])) == 1


@pytest.mark.parametrize("how", ["cut", "drop", "error", None])
def test_long_responses(how: str | None) -> None:
    limit = {"max_prompt_tokens": 9, "max_response_tokens": 4, "long_responses": how}
    encoder = encoder_of(family("gpt2"), **limit)
    rows = [Preference("a", "b", "1 2 3 4 5 6 7 8", "f:1"), Preference("a", "b", "c", "f:2")]
    if how == "error":
        with pytest.raises(UserError, match="f:1: .* data.max_response_tokens or set data.long_"):
            encoder.answers(rows)
        return
    made = encoder.answers(rows)
    assert len(made) == (1 if how == "drop" else 2)
    assert all(len(each) <= 4 for item in made for each in item.responses)
    if how is None:
        with pytest.raises(UserError, match="1 of 4 responses .*max_response_tokens=4.*long_resp"):
            encoder.check_lengths()
        encoder.answers([Preference("a", "b", "c", "f:3")] * 10)
    encoder.check_lengths()  # of 24, one is less than 5 %


def test_sides_that_are_equal_once_they_are_cut() -> None:
    limit = {"max_prompt_tokens": 9, "max_response_tokens": 2, "long_responses": "cut"}
    rows = [Preference("a", "1 2 3", "1 2 4", "f:1"), Preference("a", "b", "c", "f:2")]
    for doubtful, left in (("keep", 2), ("drop", 1)):
        encoder = encoder_of(family("gpt2"), doubtful_pairs=doubtful, **limit)
        assert len(encoder.answers(rows)) == left
        assert f"1 rows whose sides are equal once they are cut: {doubtful}" in encoder.notes()
    with pytest.raises(UserError, match="f:1: two sides have the same tokens"):
        encoder_of(family("gpt2"), doubtful_pairs="error", **limit).answers(rows)


def test_a_long_dialogue_loses_its_start_and_keeps_its_mask() -> None:
    tokenizer = family("llama3", chat_template_of("chatml"))
    row = [Demonstration(TALK[:-1], TALK[-1]["content"])]
    (whole,) = encoder_of(tokenizer).demonstrations(row)
    total = len(whole.prompt) + len(whole.response)
    last = whole.response[-(whole.loss or []).count(True) :]
    cut = encoder_of(tokenizer, max_prompt_tokens=total - len(last), long_prompts="cut")
    (shown,) = cut.demonstrations(row)
    ids = whole.prompt + whole.response
    assert shown.prompt + shown.response == ids[-len(shown) :]
    assert learnt(tokenizer, shown) in learnt(tokenizer, whole)
    assert learnt(tokenizer, shown).endswith("A song, 12 notes.<|im_end|>")
