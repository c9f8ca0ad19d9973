"""What a template leaves out is refused or counted; nothing vanishes from what is learnt."""

from typing import Any

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Demonstration, Feedback, Preference, Prompt
from rlhf_cli.data.messages import message_of
from rlhf_cli.data.raw import RowError
from rlhf_cli.data.templates import SHIPPED, TextTemplate, chat_template_of
from rlhf_cli.data.tokens import Encoder
from tests.families import family
from tests.toys import data_of

NAMES = sorted(file.stem for file in SHIPPED.glob("*.jinja"))
USER = {"role": "user", "content": "Greet Ann"}
TALK = [USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And now?"}]
CALL = {"type": "function", "function": {"name": "sing", "arguments": {"song": "la"}}}
CALLING: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "done"}
SILENT = (  # about everything but words of the user and the assistant
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}<|im_start|>"
    "{{ m['role'] }}\n{{ m['content'] or '' }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ (m['content'] or '').split('</think>')[-1] }}"
    "{% for c in m['tool_calls'] or [] %}CALL {{ c['function']['name'] }}"
    "{{ c['function']['arguments'] | tojson }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def encoder_of(jinja: str, **data: Any) -> Encoder:
    return Encoder(family("llama3", jinja), data_of(**{"template": None, **data}))


def learnt(template: str, reply: Any, turns: Any = None, **columns: Any) -> str:
    encoder = encoder_of(template)
    row = Demonstration(turns or [USER], reply, "f:1", columns)
    (shown,) = encoder.demonstrations([row])
    return str(encoder.tokenizer.decode(shown.response))


# --------------------------------------------------------------------------- calls


@pytest.mark.parametrize("content", [None, "", "I sing."])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen"])
def test_calls_that_a_template_does_not_write_are_refused(name: str, content: str | None) -> None:
    with pytest.raises(UserError, match=r"f:1: .*tool_calls.*chat_template=qwen") as told:
        learnt(chat_template_of(name), {**CALLING, "content": content})
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="tool_calls"):  # earlier ones too
        learnt(chat_template_of(name), "ok", [USER, {**CALLING, "content": content}, RESULT])


def test_pairs_that_differ_in_their_calls_are_learnt_or_refused() -> None:
    other = {"type": "function", "function": {"name": "sing", "arguments": {"song": "lo"}}}
    row = Preference([USER], CALLING, {**CALLING, "tool_calls": [other]}, "f:1")
    (item,) = encoder_of(chat_template_of("qwen")).answers([row])
    assert item.responses[0] != item.responses[1]
    with pytest.raises(UserError, match="f:1: .*tool_calls"):
        encoder_of(SILENT).answers([row])


def test_every_call_is_asked_for() -> None:
    first = "{% for m in messages %}{{ m['content'] }}{% if m['tool_calls'] %}"
    first += "{{ m['tool_calls'][0] | tojson }}{% endif %}<|end|>{% endfor %}"
    assert '"song"' in learnt(first, {**CALLING, "content": "x"})
    with pytest.raises(UserError, match="tool_calls"):
        learnt(first, {**CALLING, "content": "x", "tool_calls": [CALL, CALL]})


def test_words_beside_calls_that_are_not_written_are_counted() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
    )
    encoder = encoder_of(template)
    encoder.demonstrations([Demonstration([USER], {**CALLING, "content": "I sing."})])
    said = "1 messages have words beside tool_calls, which the chat template does not write"
    assert said in encoder.notes()


def test_a_reply_that_goes_on_from_think_keeps_its_calls() -> None:
    reply = {**CALLING, "content": "<think>\nHm.\n</think>\n\nI sing."}
    said = 'Hm.\n</think>\n\nI sing.CALL sing{"song": "la"}</s>'
    assert learnt(THINKS, reply) == said
    assert learnt(THINKS, {**reply, "content": "No."}).startswith("No.CALL sing")


def test_replies_that_lose_words_are_counted() -> None:
    drops = THINKS.replace("<think>\n{% endif", "{% endif")
    thought, plain = "<think>Hm.</think>Two", "Two"
    for template, reply, count in ((drops, thought, 1), (drops, plain, 0), (THINKS, thought, 0)):
        encoder = encoder_of(template)
        encoder.demonstrations([Demonstration([USER], reply)])
        assert len(encoder.notes()) == count
    encoder = encoder_of(drops)
    talk = [USER, {"role": "assistant", "content": thought}, USER]
    encoder.demonstrations([Demonstration(talk, plain)])
    assert any(note.startswith("1 replies are learnt otherwise") for note in encoder.notes())
    encoder = encoder_of(chat_template_of("qwen"))
    encoder.demonstrations([Demonstration([USER], thought)])  # white space alone
    assert encoder.notes() == []


def test_function_call_of_old_becomes_a_call() -> None:
    old = {"role": "assistant", "content": None}
    for call in ({"name": "sing", "arguments": '{"song": "la"}'}, '{"name": "sing"}'):
        message = message_of({**old, "function_call": call}, "messages", "f:1")
        assert message["tool_calls"][0]["function"]["name"] == "sing"
        assert "function_call" not in message
    with pytest.raises(RowError, match="f:1: .*function_call"):
        message_of({**old, "function_call": {"arguments": "{}"}}, "messages", "f:1")
    with pytest.raises(RowError, match="both"):
        message_of({**CALLING, "function_call": {"name": "f"}}, "messages", "f:1")


# --------------------------------------------------------------------------- messages, keys, tools


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
@pytest.mark.parametrize("later", [False, True])
def test_a_message_that_is_left_out_is_refused(role: str, later: bool) -> None:
    message = {"role": role, "content": "Be kind."}
    turns = [*TALK[:2], message, USER] if later else [message, USER]
    with pytest.raises(UserError, match=f"f:1: .*leaves out message {1 + 2 * later} .*{role}"):
        encoder_of(SILENT).prompts([Prompt(turns, {}, "f:1")])


def test_a_system_column_that_is_left_out_is_refused() -> None:
    with pytest.raises(UserError, match="f:1: .*leaves out message 1 .*system"):
        encoder_of(SILENT, template="chat").prompts([Prompt("a", {"system": "S"}, "f:1")])


@pytest.mark.parametrize(
    ("name", "role", "said"),
    [
        ("gemma", "developer", "first message of the system, not one of the developer"),
        ("gemma", "tool", "not one of the tool here"),
        ("mistral", "developer", "not one of the developer here"),
        ("qwen", "developer", "qwen knows system, user, assistant and tool, not developer"),
    ],
)
def test_shipped_templates_say_which_roles_they_know(name: str, role: str, said: str) -> None:
    turns = [{"role": role, "content": "x"}, USER]
    with pytest.raises(UserError, match=said):
        encoder_of(chat_template_of(name)).prompts([Prompt(turns, {}, "f:1")])
    if name != "qwen":
        turns = [*TALK[:2], {"role": "system", "content": "x"}, USER]
        with pytest.raises(UserError, match=f"{name} knows .* not one of the system here"):
            encoder_of(chat_template_of(name)).prompts([Prompt(turns, {}, "f:1")])


def test_what_templates_write_is_not_refused() -> None:
    """Every role in every place that a template knows, the tools' among them."""
    turns = [{"role": "system", "content": "S"}, *TALK[:2], USER, CALLING, RESULT, RESULT]
    encoder = encoder_of(chat_template_of("qwen"))
    encoder.prompts([Prompt(turns, {"tools": [{"name": "sing"}]}, "f:1")])
    assert encoder.notes() == []
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}"
    strict += "{% endif %}" + SILENT.replace("('user'", "('system', 'user'")
    encoder = encoder_of(strict, template=None)
    encoder.prompts([Prompt([turns[0], USER], {}, "f:1")])


def test_keys_of_messages_that_nothing_writes_are_counted() -> None:
    reply = {"role": "assistant", "content": "Hi", "reasoning_content": "Hm.", "made": {"by": "x"}}
    named = [{**USER, "name": "Ann"}]
    encoder = encoder_of(chat_template_of("qwen"))
    encoder.demonstrations([Demonstration(named, reply)])
    assert sorted(encoder.notes()) == [
        "1 messages have made, which the chat template does not write",
        "1 messages have name, which the chat template does not write",
    ]
    encoder = encoder_of(chat_template_of("chatml"))
    encoder.demonstrations([Demonstration(named, reply)] * 2)
    said = "2 messages have reasoning_content, which the chat template does not write"
    assert said in encoder.notes()


@pytest.mark.parametrize(
    "more", [{"train": False}, {"loss": 0}, {"trainable": "no"}, {"mask": 1}, {"loss_mask": 0}]
)
@pytest.mark.parametrize("template", [None, "Q: {prompt}\nA:"])
def test_other_words_for_weight_are_refused(more: dict[str, Any], template: str | None) -> None:
    reply = {"role": "assistant", "content": "Hi", **more}
    encoder = encoder_of(chat_template_of("chatml"), template=template)
    with pytest.raises(UserError, match=f"f:1: .*{next(iter(more))}=.*weight: 0"):
        encoder.demonstrations([Demonstration([USER], reply, "f:1")])
    plain = [{**USER, "train": False}, {"role": "assistant", "content": "Hi", "train": True}]
    assert len(encoder.demonstrations([Demonstration(plain[:1], plain[1])])) == 1
    assert encoder.notes() == []


def test_tools_that_the_template_does_not_write_are_counted() -> None:
    row = Prompt([USER], {"tools": [{"name": "sing"}]})
    encoder = encoder_of(chat_template_of("chatml"))
    encoder.prompts([row, row])
    assert encoder.notes() == ["2 rows have tools, which the chat template does not write"]


def test_a_judged_dialogue_says_that_its_last_reply_is_judged() -> None:
    encoder = encoder_of(chat_template_of("chatml"))
    encoder.answers([Feedback(TALK, "Bye", True)])
    said = "1 earlier replies of dialogues carry no loss: a row judges its last reply"
    assert encoder.notes() == [said]


def test_special_tokens_with_which_a_template_marks_replies_are_not_read_as_text() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{{ m['content'].split('<|end|>')[-1] if not loop.last else m['content'] }}{% else %}"
        "{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = family("llama3", template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    row = Demonstration([USER], "Hm.<|end|>Hi", "f:1")
    encoder = Encoder(tokenizer, data_of(template=None))
    with pytest.raises(UserError, match=r"f:1: .*<\|end\|>.*data.special_tokens=keep"):
        encoder.demonstrations([row])
    asked = [{"role": "user", "content": "What is <|end|>?"}]
    encoder.demonstrations([Demonstration(asked, "It is <|im_end|>.")])  # text as ever
    encoder = Encoder(tokenizer, data_of(template=None, special_tokens="keep"))
    (shown,) = encoder.demonstrations([row])
    assert encoder.ids.control["<|end|>"] in shown.response


# --------------------------------------------------------------------------- text


def test_a_text_template_writes_one_question_and_no_dialogue() -> None:
    encoder = encoder_of(chat_template_of("chatml"), template="Q: {prompt}\nA:")
    rows = [Demonstration([USER], " Hi"), Demonstration("Greet Ann", " Hi")]
    one, two = encoder.demonstrations(rows)
    assert one == two and encoder.stop_ids == [encoder.tokenizer.eos_token_id]
    system = {"role": "system", "content": "S"}
    for turns in (TALK, [*TALK[:2]], [{**system, "role": "developer"}, USER]):
        with pytest.raises(UserError, match="f:1: the prompt is a dialogue.*data.template=chat"):
            encoder.prompts([Prompt(turns, {}, "f:1")])
    with pytest.raises(UserError, match=r"f:1: .*no \{system\}"):
        encoder.prompts([Prompt([system, USER], {}, "f:1")])
    encoder = encoder_of(chat_template_of("chatml"), template="{system} Q: {prompt}")
    ((_, ids),) = encoder.prompts([Prompt([system, USER])])
    assert encoder.tokenizer.decode(ids) == "<s>S Q: Greet Ann"
    encoder.check_lengths()


def test_a_chat_template_beside_a_text_is_told() -> None:
    with pytest.raises(UserError, match="data.chat_template=chatml is not used"):
        encoder_of("", chat_template="chatml", template="Q: {prompt}")
    encoder = encoder_of("", chat_template="chatml", template="{prompt}")
    encoder.prompts([Prompt("a"), Prompt([USER])])
    assert any("data.chat_template does not write" in note for note in encoder.notes())


def test_paths_in_braces_are_filled() -> None:
    template = TextTemplate("{prompt} {info.t} {info.tags.1}")
    row = {"info": {"t": "T", "tags": ["a", "b"]}}
    assert template.fill("p", row, "f:1") == "p T b"
    with pytest.raises(UserError, match=r"f:1: data.template: no key 't' in column 'info'"):
        template.fill("p", {"info": {"u": 1}}, "f:1")
    with pytest.raises(UserError, match=r"f:1: .* has \{info.t\}, but the row has no info.t"):
        template.fill("p", {}, "f:1")


@pytest.mark.parametrize("slip", ["my col", "c!r", "c:>3", " prompt ", " c", "prompt!s"])
def test_columns_in_braces_that_are_written_otherwise_are_refused(slip: str) -> None:
    template = TextTemplate(f"{{prompt}} {{{slip}}}")
    with pytest.raises(UserError, match="f:1: data.template has .*plain braces"):
        template.fill("p", {"my col": 1, "c": 2}, "f:1")
    doubled = TextTemplate(f"{{prompt}} {{{{{slip}}}}}")
    assert doubled.fill("p", {"c": 2, "my col": 1}, "f:1") == f"p {{{slip}}}"


@pytest.mark.parametrize("name", ["label", "source", "chosen"])
def test_columns_that_no_template_shows_are_told(name: str) -> None:
    with pytest.raises(UserError, match=rf"f:1: .*\{{{name}\}}.*shown by no template"):
        TextTemplate(f"{{prompt}} {{{name}}}").fill("p", {"c": 2}, "f:1")
