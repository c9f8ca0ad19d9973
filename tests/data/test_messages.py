"""Messages wherever text is: one form for all that people write, prompt and replies apart."""

import json
from typing import Any

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.checks import doubted
from rlhf_cli.data.conversions import convert
from rlhf_cli.data.held_out import identity
from rlhf_cli.data.kinds import (
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Row,
    Stepwise,
    derive,
    reply_text,
)
from rlhf_cli.data.readers import as_row
from tests.toys import data_of


def said(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


U, A, B = said("user", "Name a bird."), said("assistant", "A lark."), said("assistant", "A stone.")
SYSTEM, MORE, AGAIN = (
    said("system", "Be brief."),
    said("user", "And?"),
    said("assistant", "A wren."),
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RAIN = said("tool", "rain", name="weather")
THINKS = said("assistant", "A lark.", reasoning_content="It sings.")
P = "Name a bird."


def read(**columns: Any) -> Any:
    return as_row(columns, "f:1")


MIXED: list[tuple[dict[str, Any], Row]] = [
    # a message, a list of one, and text are one
    ({"prompt": U, "completion": A}, Demonstration([U], "A lark.", learn_from=1)),
    ({"prompt": P, "completion": [A]}, Demonstration(P, "A lark.")),
    ({"prompt": [U], "chosen": "A lark.", "rejected": [B]}, Preference([U], "A lark.", "A stone.")),
    (
        {"prompt": P, "responses": ["a", A, [B]], "ranks": [1, 2, 3]},
        Ranking(P, ["a", "A lark.", "A stone."], [1.0, 2.0, 3.0]),
    ),
    (
        {"prompt": [U], "steps": ["one", A], "labels": [1, 0]},
        Stepwise([U], ["one", "A lark."], [1.0, 0.0]),
    ),
    ({"prompt": [U], "completion": [A], "label": "yes"}, Feedback([U], "A lark.", True)),
    # other keys stay with the message
    ({"prompt": P, "completion": THINKS}, Demonstration(P, THINKS)),
    ({"messages": [U, THINKS]}, Demonstration([U], THINKS)),
    ({"messages": [U, ASKS, RAIN, A]}, Demonstration([U, ASKS, RAIN], "A lark.")),
    ({"messages": [U, ASKS]}, Demonstration([U], ASKS)),
    ({"messages": [U, {**ASKS, "content": ""}]}, Demonstration([U], {**ASKS, "content": ""})),
    ({"messages": [{**U, "name": None}, {**A, "tool_calls": None}]}, Demonstration([U], "A lark.")),
    ({"messages": [U, {**A, "tool_calls": []}]}, Demonstration([U], "A lark.")),
    # roles by other names, and parts of text
    (
        {
            "messages": [
                said("System", "Be brief."),
                said("HUMAN", P),
                said(" Assistant", "A lark."),
            ]
        },
        Demonstration([SYSTEM, U], "A lark."),
    ),
    (
        {"messages": [{"from": "human", "value": P}, {"from": "gpt", "value": "A lark."}]},
        Demonstration([U], "A lark."),
    ),
    (
        {
            "messages": [
                said("user", [{"type": "text", "text": "Name "}, {"text": "a bird."}]),
                said("assistant", ["A ", "lark."]),
            ]
        },
        Demonstration([U], "A lark."),
    ),
    # arguments in JSON would be quoted by a template
    (
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"town": "Ulm"}'},
                        }
                    ],
                },
            ]
        },
        Demonstration([U], ASKS),
    ),
    # dialogues in cells of a table
    ({"messages": json.dumps([U, A])}, Demonstration([U], "A lark.")),
    ({"prompt": json.dumps([U]), "completion": " c"}, Demonstration([U], " c", learn_from=1)),
    (
        {"chosen": json.dumps([U, A]), "rejected": json.dumps([U, B])},
        Preference([U], "A lark.", "A stone."),
    ),
    (
        {"prompt": P, "chosen": json.dumps(A), "rejected": '{"from": "gpt", "value": "A stone."}'},
        Preference(P, "A lark.", "A stone."),
    ),
    # text stays text
    ({"prompt": '{"role": "cook", "content": "x"}'}, Prompt('{"role": "cook", "content": "x"}')),
    ({"prompt": f"{[U]} What is this?"}, Prompt(f"{[U]} What is this?")),
    ({"prompt": "{'value': 3}"}, Prompt("{'value': 3}")),
    (
        {"messages": [U, ASKS, said("tool", str([U])), A]},
        Demonstration([U, ASKS, said("tool", str([U]))], "A lark."),
    ),
    # a short prompt may be said again, a word may begin like it, and some replies may quote it
    (
        {"prompt": "Hello", "chosen": "Hello!", "rejected": "Hello you"},
        Preference("Hello", "Hello!", "Hello you"),
    ),
    (
        {"prompt": "See the", "chosen": "See there", "rejected": "See then"},
        Preference("See the", "See there", "See then"),
    ),
    (
        {"prompt": P, "chosen": f"{P} A lark.", "rejected": "A stone."},
        Preference(P, f"{P} A lark.", "A stone."),
    ),
    (
        {"prompt": "Good day to", "completion": "Good day to you!"},
        Demonstration("Good day to", "Good day to you!"),
    ),
    ({"prompt": "Say a b c", "completion": "a b c"}, Demonstration("Say a b c", "a b c")),
    ({"prompt": "a b c d", "completion": "a b c d"}, Demonstration("a b c d", "a b c d")),
    (
        {"prompt": P, "responses": ["a", "b", "c"], "ranks": [1, 2, 2], "scores": [3, 3, 1]},
        Ranking(P, ["a", "b", "c"], [1.0, 2.0, 2.0]),
    ),
    ({"prompt": "[1, 2] is a list?"}, Prompt("[1, 2] is a list?")),
    ({"prompt": '[{"a": 1}]'}, Prompt('[{"a": 1}]')),
    ({"prompt": '[{"role": "user"}]'}, Prompt('[{"role": "user"}]')),
    ({"prompt": f"{json.dumps([U])} What is this?"}, Prompt(f"{json.dumps([U])} What is this?")),
    # whole dialogues beside a prompt: the first question, the last one, or the beginning
    (
        {"prompt": P, "chosen": [SYSTEM, U, A, MORE, AGAIN], "rejected": [SYSTEM, U, A, MORE, B]},
        Preference([SYSTEM, U, A, MORE], "A wren.", "A stone."),
    ),
    (
        {"prompt": "And?", "chosen": [U, A, MORE, AGAIN], "rejected": [U, A, MORE, B]},
        Preference([U, A, MORE], "A wren.", "A stone."),
    ),
    (
        {"prompt": [SYSTEM, U], "chosen": [SYSTEM, U, A], "rejected": [U, B]},
        Preference([SYSTEM, U], "A lark.", "A stone."),
    ),
    (
        {"prompt": P, "chosen": [U, A], "rejected": "A stone."},
        Preference([U], "A lark.", "A stone."),
    ),
    ({"prompt": P, "messages": [U, A, MORE, AGAIN]}, Demonstration([U, A, MORE], "A wren.")),
    (
        {"prompt": P, "completion": [U, A, MORE, AGAIN]},
        Demonstration([U, A, MORE], "A wren.", learn_from=1),
    ),
    (
        {"prompt": "And?", "completion": [U, A, MORE, AGAIN]},
        Demonstration([U, A, MORE], "A wren.", learn_from=3),
    ),
    ({"messages": [U], "completion": "A lark."}, Demonstration([U], "A lark.", learn_from=1)),
    # what the assistant and its tools did before the last reply joins the prompt
    (
        {"prompt": P, "completion": [ASKS, RAIN, A]},
        Demonstration([U, ASKS, RAIN], "A lark.", learn_from=1),
    ),
    (
        {"prompt": [U], "completion": [ASKS, RAIN, A], "system": "Be brief."},
        Demonstration([SYSTEM, U, ASKS, RAIN], "A lark.", learn_from=2),
    ),
    # a prompt may end in the assistant's words
    (
        {"prompt": [U, said("assistant", "A l")], "completion": "ark."},
        Demonstration([U, said("assistant", "A l")], "ark.", learn_from=2),
    ),
    # a system message
    ({"prompt": P, "system": "Be brief."}, Prompt(P, {"system": "Be brief."})),
    ({"prompt": P, "system": ""}, Prompt(P)),
    ({"prompt": [U], "system": "Be brief."}, Prompt([SYSTEM, U])),
    ({"prompt": [SYSTEM, U], "system": "Be brief."}, Prompt([SYSTEM, U])),
    (
        {"system": "Be brief.", "chosen": [U, A], "rejected": [U, B]},
        Preference([SYSTEM, U], "A lark.", "A stone."),
    ),
    ({"prompt": P, "tools": [CALL]}, Prompt(P, {"tools": [CALL]})),
    ({"prompt": P, "tools": json.dumps([CALL])}, Prompt(P, {"tools": [CALL]})),
    ({"prompt": P, "tools": []}, Prompt(P)),
    # weights
    (
        {"messages": [U, {**A, "weight": 0}, {**MORE, "weight": 0}, {**AGAIN, "weight": 1}]},
        Demonstration([U, {**A, "weight": 0}, MORE], "A wren."),
    ),
    (
        {"prompt": P, "completion": "c", "weight": 1.0},
        Demonstration(P, "c", columns={"weight": 1.0}),
    ),
]


@pytest.mark.parametrize(("columns", "expected"), MIXED)
def test_messages_and_text_in_any_mix(columns: dict[str, Any], expected: Row) -> None:
    found = read(**columns)
    assert found.source == "f:1"
    found.source = ""
    assert found == expected
    assert "system" not in found.columns or not isinstance(found.prompt, list)


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [U, said("assistant", None)]}, "content holds NoneType, expected text"),
    ({"messages": [{"role": "user"}]}, "needs messages with role and content"),
    ({"messages": ["hi", A]}, "needs messages with role and content"),
    ({"messages": [said(3, "x"), A]}, "role holds int, expected text"),
    ({"messages": [said("critic", "x"), A]}, "role 'critic' is none of system, user, assistant"),
    ({"messages": [said("user", 3), A]}, "content holds int, expected text"),
    (
        {"messages": [said("user", [{"type": "image_url", "image_url": "x"}]), A]},
        "content holds a part of type 'image_url'; only text is read, no images",
    ),
    ({"messages": [{**U, "images": ["x.png"]}, A]}, "a message holds 'images'; only text is read"),
    ({"messages": [said("user", [{"type": "text"}]), A]}, "a part without text"),
    ({"messages": [U, A, U]}, "must end in a reply of the assistant; data=rows data.columns"),
    ({"messages": [A]}, "must end in a reply of the assistant to another message"),
    ({"messages": [U, said("assistant", " ")]}, "must end in a reply"),
    ({"messages": [U, A, B]}, "ends in two messages of the assistant; join them"),
    ({"messages": [U, ASKS, RAIN]}, "must end in a reply"),
    ({"messages": [U, {**ASKS, "tool_calls": "x"}]}, "tool_calls holds 'x', expected a list"),
    ({"messages": [{**U, "tool_calls": [CALL]}, A]}, "stand in a message of the user"),
    ({"messages": [U, {**A, "weight": 0.5}]}, "the weight of a message is 0 or 1"),
    ({"messages": [{**U, "weight": 1}, A]}, "has weight 1, but only the assistant's are learnt"),
    ({"prompt": P, "chosen": {**A, "weight": 0}, "rejected": "b"}, "weight 0 cannot be judged"),
    (
        {"prompt": P, "completion": "c", "weight": 0.5},
        "column 'weight' holds 0.5, but rows have no",
    ),
    (
        {"prompt": P, "chosen": [U], "rejected": [said("user", "What?")]},
        "'chosen' must end in a rep",
    ),
    ({"prompt": P, "chosen": A, "rejected": U}, "'rejected' must end in a reply"),
    ({"chosen": [U, A], "rejected": [MORE, B]}, "differ before their last message"),
    ({"chosen": [U, A], "rejected": "A stone."}, "no column 'prompt'"),
    (
        {"prompt": "Else?", "chosen": [U, A], "rejected": [U, B]},
        "'chosen' is a dialogue that neither",
    ),
    ({"prompt": "Else?", "messages": [U, A]}, "'messages' is a dialogue that neither begins"),
    ({"prompt": [U, MORE], "completion": [U, A]}, "'completion' is a dialogue that neither"),
    (
        {"prompt": P, "responses": [[U, A], [SYSTEM, U, B]], "ranks": [1, 2]},
        "the responses differ before their last message",
    ),
    ({"prompt": [SYSTEM, U], "system": "Be long."}, "differs from the dialogue's system message"),
    ({"prompt": P, "system": 3}, "column 'system' holds int, expected text"),
    ({"prompt": P, "tools": "none"}, "column 'tools' holds str, expected a list"),
    ({"prompt": {"text": "x"}}, "column 'prompt' holds dict, expected text"),
    ({"prompt": []}, "column 'prompt' holds nothing, expected text"),
    *(
        ({"prompt": P, "completion": printed}, "'completion' holds messages as Python prints them")
        for printed in (
            *(str([U, A]), str(A), f"[{U} {A}]", f"[{U}\n {A}]", f"array([{U}, {A}])"),
            *(f"[array([{U}], dtype=object)]", f"array([{U}, {A}], dtype=object)\n", str((U, A))),
            "{'from': 'gpt', 'value': \"it's\"}",
        )
    ),
    ({"prompt": str([U])}, "column 'prompt' holds messages as Python prints them"),
    ({"messages": f"[{U}\n {A}]"}, "column 'messages' holds messages as Python prints them"),
    ({"text": str([U, A])}, "column 'text' holds messages as Python prints them"),
    ({"prompt": P, "system": str([SYSTEM])}, "column 'system' holds messages as Python"),
    ({"messages": [U, said("assistant", str([A]))]}, "'messages' holds messages as Python"),
    ({"prompt": P, "responses": ["a", str([A])], "ranks": [1, 2]}, "'responses' holds messages as"),
    # the prompt once more
    (
        {"prompt": "Question 0?", "chosen": "Question 0? yes", "rejected": "Question 0? no"},
        "chosen and rejected begin with the whole prompt, which would be learnt twice; write the",
    ),
    (
        {
            "prompt": [said("user", "Question 0?")],
            "chosen": " Question 0?\nyes",
            "rejected": "Question 0?no",
        },
        "chosen and rejected begin with the whole prompt",
    ),
    (
        {"prompt": "Question 0?", "responses": ["Question 0? a", "Question 0? b"], "ranks": [1, 2]},
        "the responses begin with the whole prompt",
    ),
    (
        {"prompt": "Question 0?", "completion": "Question 0? a"},
        "the completion begins with the whole",
    ),
    (
        {"prompt": "Tell me of it. ", "completion": "Tell me of it. No.", "label": True},
        "the completion begins with the whole prompt",
    ),
    (
        {"prompt": P, "responses": ["a", "b"], "ranks": [1, 2], "scores": [1, 2]},
        "columns 'ranks' (1 is best) and 'scores' (higher is better) order the responses differ",
    ),
    (
        {"prompt": P, "responses": ["a", "b"], "ranks": [1, 2], "scores": [1]},
        "column 'scores' needs one number for each of 2",
    ),
    ({"prompt": P, "steps": [[U, A]], "labels": [1]}, "'steps' holds 2 messages, expected text"),
    (
        {"messages": [said("user", "\ud83d"), A]},
        r"column 'messages' holds half a character: \ud83d",
    ),
]


@pytest.mark.parametrize(("columns", "line"), FAULTS)
def test_messages_that_are_refused(columns: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        read(**columns)
    assert str(caught.value).startswith("f:1: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_judged_reply_alone_is_learnt() -> None:
    """Of what is derived from judgements: the replies before it were not judged."""
    pair = read(chosen=[U, A, MORE, AGAIN], rejected=[U, A, MORE, B])
    assert derive([pair], Demonstration, "") == [
        Demonstration([U, A, MORE], "A wren.", "f:1", learn_from=3)
    ]
    assert derive([read(messages=[U, A, MORE, AGAIN])], Demonstration, "")[0].learn_from == 0


def test_prompts_that_differ_by_system_message_are_two() -> None:
    rows = [
        read(prompt=P, completion="c", label=1),
        read(prompt=P, completion="d", label=0),
        read(prompt=P, completion="c", label=1, system="Be brief."),
    ]
    prompts = derive(rows, Prompt, "")
    assert [row.columns.get("system") for row in prompts] == [None, "Be brief."]


def test_replies_that_call_tools_are_compared_and_converted() -> None:
    other = {**ASKS, "tool_calls": [{**CALL, "id": "2"}]}
    rows = [
        read(prompt=P, chosen=ASKS, rejected=dict(ASKS)),
        read(prompt=P, chosen=ASKS, rejected=other),
        read(prompt=P, chosen=other, rejected=ASKS),
        read(prompt=P, chosen=ASKS, rejected="No."),
    ]
    notes: list[str] = []
    assert doubted(rows, "drop", notes).tolist() == [row is rows[3] for row in rows]
    assert notes[0].startswith("1 of 4 rows judge a text against itself")
    assert notes[1].startswith("2 of 4 rows are judged both ways")
    judged = convert(rows[3:] * 2, "preference_to_feedback", data_of())[0]
    (ranking,) = convert(judged, "feedback_to_ranking", data_of())[0]
    assert isinstance(ranking, Ranking)
    assert (ranking.responses, ranking.ranks) == ([ASKS, "No."], [1.0, 2.0])
    (stepwise,) = convert(judged[1:2], "feedback_to_stepwise", data_of())[0]
    assert isinstance(stepwise, Stepwise) and stepwise.steps == ["No."]
    assert reply_text(ASKS) == ""


def test_the_identity_of_a_dialogue_reads_all_its_keys() -> None:
    one, two = read(prompt=[U, ASKS, RAIN]), read(prompt=[U, ASKS, {**RAIN, "name": "clock"}])
    spaced = read(prompt=[said("user", "Name  a\nbird."), ASKS, RAIN])
    assert identity(one) == identity(spaced) != identity(two)
