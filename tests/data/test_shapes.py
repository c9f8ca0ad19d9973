"""Published shapes of rows: each by the option of its name, and named where another is asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import (
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Row,
    Stepwise,
    Text,
)
from rlhf_cli.data.shapes.formats import FORMATS, reader_of
from tests.toys import all_rows, data_of


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def read(row: Any, format: str, **data: Any) -> Row:
    return reader_of(data_of(format=format, **data))(row, "f.jsonl:1")


ASKED = said("user", "Name a bird.")
LARK, STONE = said("assistant", "A lark."), said("assistant", "A stone.")
TALK = [ASKED, LARK]
OPENBMB = {
    "source": "evol_instruct",
    "instruction": "Name a bird.",
    "models": ["m", "n"],
    "completions": [
        {"model": "m", "response": "A lark.", "overall_score": 10.0, "fine-grained_score": 2.25},
        {"model": "n", "response": "A wren.", "overall_score": 7.0, "fine-grained_score": 4.5},
    ],
    "correct_answers": ["None"],
}
BINARIZED = {
    "prompt": "Name a bird.",
    "prompt_id": "ab12",
    "chosen": TALK,
    "rejected": [ASKED, STONE],
    "messages": TALK,
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}
STEPSTONE = {
    "prompt": "Name a bird.",
    "response": "A lark.",
    "helpfulness": 3,
    "correctness": 4,
    "coherence": 4,
}
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": [ASKED],
    "response1": "A lark.",
    "response2": "A stone.",
    "overall_preference": -2,
}


def step(*ratings: int | None, chosen: int | None = None, human: str | None = None) -> Any:
    completions = [
        {"text": f"so {n}", "rating": r, "flagged": False} for n, r in enumerate(ratings)
    ]
    written = human and {"text": human, "rating": None}
    return {"completions": completions, "human_completion": written, "chosen_completion": chosen}


def solution(*steps: Any, reason: str = "solution") -> Any:
    question = {"problem": "1 + 1 + 1?", "ground_truth_answer": "3", "pre_generated_steps": []}
    return {
        "labeler": "x",
        "question": question,
        "label": {"steps": list(steps), "total_time": 9, "finish_reason": reason},
    }


COMPARISON = {
    "info": {"id": "t3", "post": "I met a hen.", "title": "Hens", "subreddit": "farms"},
    "split": "train",
    "summaries": [{"text": " A hen.", "policy": "a"}, {"text": " Met a hen.", "policy": "b"}],
    "choice": 1,
    "worker": "w",
}
QUESTION = {
    "qid": 7,
    "question": "How do hens sleep?",
    "answers": [
        {"answer_id": 1, "text": "Well.", "pm_score": 4, "selected": True},
        {"answer_id": 2, "text": "Badly.", "pm_score": 0, "selected": False},
        {"answer_id": 3, "text": "Often.", "pm_score": 4, "selected": False},
    ],
    "date": "2012",
}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [said("user", "1 + 1 + 1?")],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 0},
}
HH = "\n\nHuman: a\n\nAssistant:"
CALL = {"name": "weather", "arguments": {"town": "Ulm"}}

SHAPES: list[tuple[str, Any, Row]] = [
    (
        "alpaca",
        {"instruction": "Put it in the plural.", "input": "goose", "output": "geese", "text": "##"},
        Demonstration("Put it in the plural.\n\ngoose", "geese", columns={"text": "##"}),
    ),
    (
        "alpaca",
        {"instruction": "Sing.", "input": "", "output": "La.", "system": "Be a bird."},
        Demonstration("Sing.", "La.", columns={"system": "Be a bird."}),
    ),
    (
        "alpaca",
        {"instruction": "Sing.", "input": " ", "output": "La."},
        Demonstration("Sing.", "La."),
    ),
    (
        "alpaca",
        {
            "instruction": "Again.",
            "output": "La la.",
            "history": [["Sing.", "La."]],
            "system": "Be a bird.",
        },
        Demonstration(
            [
                *(said("system", "Be a bird."), said("user", "Sing."), said("assistant", "La.")),
                said("user", "Again."),
            ],
            "La la.",
        ),
    ),
    (
        "alpaca",
        {"instruction": "Sing.", "chosen": "La.", "rejected": "No."},
        Preference("Sing.", "La.", "No."),
    ),
    (
        "alpaca",
        {"instruction": "Sing.", "output": "No.", "kto_tag": False},
        Feedback("Sing.", "No.", False),
    ),
    (
        "sharegpt",
        {
            "id": "q",
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Name a bird."},
                {"from": "gpt", "value": "A lark."},
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "A wren."},
            ],
        },
        Demonstration(
            [said("system", "Be brief."), ASKED, LARK, said("user", "And?")],
            "A wren.",
            columns={"id": "q"},
        ),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Name a bird."}],
            "chosen": {"from": "gpt", "value": "A lark."},
            "rejected": {"from": "gpt", "value": "A stone."},
        },
        Preference([ASKED], "A lark.", "A stone."),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "It rains."},
            ],
            "tools": '[{"name": "weather"}]',
        },
        Demonstration(
            [
                said("user", "Weather?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": CALL}],
                },
                said("tool", "rain"),
            ],
            "It rains.",
            columns={"tools": [{"name": "weather"}]},
        ),
    ),
    ("messages", {"messages": TALK, "prompt": "other"}, Demonstration([ASKED], "A lark.")),
    ("ultrafeedback", BINARIZED, Preference([ASKED], "A lark.", "A stone.", margin=2.5)),
    (
        "ultrafeedback",
        OPENBMB,
        Ranking("Name a bird.", ["A lark.", "A wren."], [-2.25, -4.5], group="evol_instruct"),
    ),
    (
        "helpsteer",
        STEPSTONE,
        Feedback(
            *("Name a bird.", "A lark.", None, 3.0), columns={"correctness": 4, "coherence": 4}
        ),
    ),
    (
        "helpsteer",
        STEPSTONE
        | {"prompt": "Hi\n\n<extra_id_1>Assistant\nHello.\n\n<extra_id_1>User\nName a bird."},
        Feedback(
            [said("user", "Hi"), said("assistant", "Hello."), ASKED],
            *("A lark.", None, 3.0),
            columns={"correctness": 4, "coherence": 4},
        ),
    ),
    ("helpsteer", HELPSTEER3, Preference([ASKED], "A lark.", "A stone.", margin=2.0)),
    (
        "helpsteer",
        HELPSTEER3 | {"overall_preference": 1},
        Preference([ASKED], "A stone.", "A lark.", margin=1.0),
    ),
    (
        "helpsteer",
        {
            "prompt": "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nName a bird.",
            "response_1": "A lark.",
            "response_2": "A stone.",
            "preference_strength": -2,
        },
        Preference(
            [said("user", "Hi"), said("assistant", "Hello."), ASKED],
            *("A lark.", "A stone."),
            margin=2.0,
        ),
    ),
    (
        "helpsteer",
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "3"},
        Preference("q", "b", "a", margin=3.0),
    ),
    (
        "kto",
        {"prompt": [ASKED], "completion": [STONE], "label": False},
        Feedback([ASKED], "A stone.", False),
    ),
    (
        "prm800k",
        solution(step(-1, 1, chosen=1), step(0, chosen=0), step(-1, 1, human="by hand"), step(-1)),
        Stepwise("1 + 1 + 1?", ["so 1", "so 0", "by hand", "so 0"], [1.0, 1.0, 1.0, 0.0]),
    ),
    (
        "prm800k",
        {"prompt": "1 + 1?", "completions": ["1", "so 3"], "labels": [True, False]},
        Stepwise("1 + 1?", ["1", "so 3"], [1.0, 0.0]),
    ),
    (
        "prm800k",
        {
            "input": "1 + 1 + 1? Step 1: 1 + 1 = 2 \u043a\u0438\nStep 2: 2 + 1 = 4 \u043a\u0438",
            "label": "1 + 1 + 1? Step 1: 1 + 1 = 2 +\nStep 2: 2 + 1 = 4 -",
            "task": "GSM8K",
        },
        Stepwise("1 + 1 + 1?", ["Step 1: 1 + 1 = 2", "Step 2: 2 + 1 = 4"], [1.0, 0.0]),
    ),
    (
        "tldr",
        COMPARISON,
        Preference(
            "SUBREDDIT: r/farms\n\nTITLE: Hens\n\nPOST: I met a hen.\n\nTL;DR:",
            *(" Met a hen.", " A hen."),
        ),
    ),
    ("tldr", {"prompt": "p TL;DR:", "completion": " c"}, Demonstration("p TL;DR:", " c")),
    (
        "stack_exchange",
        QUESTION,
        Ranking("How do hens sleep?", ["Well.", "Badly.", "Often."], [-4.0, -0.0, -4.0]),
    ),
    (
        "stack_exchange",
        {"qid": 7, "question": "q", "response_j": "better", "response_k": "worse"},
        Preference("q", "better", "worse"),
    ),
    (
        "verl",
        VERL,
        Prompt(
            [said("user", "1 + 1 + 1?")],
            {"answer": "3", **{name: VERL[name] for name in VERL if name != "prompt"}},
        ),
    ),
    (
        "verl",
        {"prompt": "p", "reward_model": '{"style": "rule", "ground_truth": "3"}'},
        Prompt("p", {"answer": "3", "reward_model": '{"style": "rule", "ground_truth": "3"}'}),
    ),
    ("text", {"text": "Once.", "prompt": "p", "id": 3}, Text("Once.")),
]


@pytest.mark.parametrize(("option", "row", "expected"), SHAPES)
def test_a_published_shape(option: str, row: Any, expected: Row) -> None:
    found = read(row, option)
    assert found.source == "f.jsonl:1"
    found.source = ""
    if option == "messages":
        assert found.columns.pop("prompt") == "other"
    assert found == expected


@pytest.mark.parametrize("option", sorted({option for option, _, _ in SHAPES}))
def test_an_option_of_data_for_each_shape(option: str, tmp_path: Path) -> None:
    """And its rows are read from a file with nothing else said."""
    rows = [(row, kind) for name, row, kind in SHAPES if name == option]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
    data = compose("dpo", [f"data={option}", f"data.path={file}", "policy=x"]).data
    assert data.format == option
    kind = type(rows[0][1]) if len(rows) == 1 else Prompt
    assert all_rows(file, kind, format=option, columns=data.columns)


def test_the_old_name_of_rows_reads_them_too() -> None:
    words = ["data.path=x.jsonl", "policy=x"]
    assert compose("dpo", ["data=jsonl", *words]).data == compose("dpo", ["data=rows", *words]).data


FAULTS: list[tuple[str, Any, str]] = [
    ("alpaca", {"instruction": "Sing."}, "no column 'output'"),
    (
        "alpaca",
        {"instruction": "x", "output": "y", "history": [["a"]]},
        "'history' must hold pairs",
    ),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "must end in a reply"),
    ("sharegpt", {"conversations": "x"}, "'conversations' must hold a list of messages"),
    ("sharegpt", {"conversations": [{"from": "cat", "value": "x"}]}, "role 'cat' is none of"),
    (
        "sharegpt",
        {"conversations": TALK, "chosen": LARK, "rejected": STONE},
        "column 'conversations' ends in a reply; beside chosen and rejected it must end in",
    ),
    ("messages", {"text": "x"}, "no column 'messages'; found text"),
    ("kto", {"prompt": "p", "completion": "c"}, "no column 'label'"),
    (
        "kto",
        {"prompt": "p", "completion": "c", "label": 2},
        "column 'label' holds 2, expected true",
    ),
    ("ultrafeedback", OPENBMB | {"completions": [{"model": "m"}]}, "'completions': no 'response'"),
    ("ultrafeedback", OPENBMB | {"completions": []}, "2 or more responses, got 0"),
    (
        "ultrafeedback",
        BINARIZED | {"score_chosen": 5.0},
        "column 'score_chosen' holds 5, less than 'score_rejected' with 6",
    ),
    (
        "hh",
        {"chosen": HH + " b", "rejected": HH + " c\n\nHuman: what?"},
        r"column 'rejected' goes on with '\n\nHuman:' after the reply that is compared",
    ),
    (
        "hh",
        {"chosen": HH + " b\n\nHuman: what?", "rejected": HH + " c"},
        r"column 'chosen' goes on with '\n\nHuman:'",
    ),
    (
        "hh",
        {"chosen": HH + " b", "rejected": HH + " c\n\nHuman: x\n\nAssistant: y"},
        r"column 'rejected' goes on with '\n\nHuman:'",
    ),
    (
        "alpaca",
        {
            "instruction": "Name a bird?",
            "chosen": "Name a bird? Lark",
            "rejected": "Name a bird? No",
        },
        "chosen and rejected begin with the whole prompt",
    ),
    (
        "rows",
        {"prompt": HH, "chosen": HH + " b", "rejected": HH + " c"},
        "chosen and rejected are whole dialogues; these look like HH dialogues: data=hh",
    ),
    (
        "rows",
        {"prompt": "a", "chosen": HH + " b", "rejected": HH + " c"},
        "these look like HH dialogues: data=hh",
    ),
    ("helpsteer", HELPSTEER3 | {"overall_preference": 0}, "neither response is better"),
    ("helpsteer", HELPSTEER3 | {"overall_preference": 5}, "holds 5, expected -3 to 3"),
    ("helpsteer", {"prompt": "p", "response": "r"}, "no column 'helpfulness'"),
    ("prm800k", solution(reason="bad_problem"), "a bad problem"),
    ("prm800k", solution(), "column 'steps' is empty"),
    ("prm800k", solution(step(2, chosen=0)), "a rating is -1, 0 or 1, this one holds 2"),
    ("prm800k", solution(step(1, chosen=3)), "chosen_completion 3 is none of 1 steps"),
    ("prm800k", {"prompt": "p", "completions": ["a"], "labels": [7]}, "column 'labels' holds 7"),
    ("prm800k", {"input": "x", "label": "y"}, "are no steps with + and -"),
    ("tldr", COMPARISON | {"choice": 2}, "a choice of 0 or 1"),
    ("tldr", COMPARISON | {"info": {}}, "column 'info': no 'post'; found none"),
    ("stack_exchange", QUESTION | {"answers": [3]}, "'answers' must hold a list of objects"),
    ("verl", {"prompt": "p", "reward_model": "x"}, "'reward_model' holds str, expected an object"),
    ("verl", {"prompt": "p", "reward_model": {"style": "rule"}}, "no 'ground_truth'; found style"),
    ("text", {"prompt": "p"}, "no column 'text'; found prompt"),
]


@pytest.mark.parametrize(("option", "row", "line"), FAULTS)
def test_a_fault_of_a_published_shape(option: str, row: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read(row, option)
    assert str(caught.value).startswith("f.jsonl:1: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


OTHERS = [
    ({"conversations": []}, "ShareGPT conversations: data=sharegpt"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "data=sharegpt"),
    ({"instruction": "x", "input": "", "output": "y"}, "these look like Alpaca rows: data=alpaca"),
    (OPENBMB, "data=ultrafeedback"),
    (HELPSTEER3, "data=helpsteer"),
    (
        {"response_1": "a", "response_2": "b", "preference_strength": 1},
        "these look like HelpSteer rows: data=helpsteer",
    ),
    (solution(step(1, chosen=0)), "these look like PRM800K solutions: data=prm800k"),
    (COMPARISON, "data=tldr"),
    (QUESTION, "data=stack_exchange"),
    ({"question": "q", "answer": "so\n#### 4"}, "these look like GSM8K problems: data=gsm8k"),
    ({"question": "q", "m": {"solution": "a", "is_correct": True}}, "data=gsm8k_solutions"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "HH dialogues: data=hh"),
]


@pytest.mark.parametrize(("row", "line"), OTHERS)
@pytest.mark.parametrize("option", ["rows", "verl", "kto"])
def test_rows_of_another_shape_are_named(option: str, row: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read(row, option)
    assert str(caught.value).endswith(line)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (STEPSTONE, "; these look like HelpSteer rows: data=helpsteer"),
        ({"prompt": "p", "completions": ["a"], "labels": [True]}, "data=prm800k"),
        (
            {"prompt": "p", "output": "c"},
            "; data.columns.completion=output reads its column 'output'",
        ),
    ],
)
def test_a_prompt_alone_is_told_what_it_may_be(row: Any, line: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        all_rows(file, Demonstration)
    assert "this is a prompt row" in str(caught.value)
    assert str(caught.value).endswith(line)


def test_the_option_in_use_is_not_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(VERL) + "\n")
    with pytest.raises(UserError, match="this is a prompt row") as caught:
        all_rows(file, Demonstration, format="verl")
    assert "data=verl" not in str(caught.value)
    with pytest.raises(UserError, match="these look like rows for verl: data=verl$"):
        all_rows(file, Demonstration)


@pytest.mark.parametrize("option", ["alpaca", "verl", "sharegpt"])
def test_columns_map_to_those_of_the_shape(option: str) -> None:
    rows = {
        "alpaca": ({"q": "Sing.", "output": "La."}, {"instruction": "q"}),
        "verl": (VERL | {"asked": "p"}, {"prompt": "asked", "level": "extra_info.index"}),
        "sharegpt": ({"talk": TALK}, {"conversations": "talk"}),
    }
    row, columns = rows[option]
    found = read(row, option, columns=columns)
    if isinstance(found, Prompt):
        assert (found.prompt, found.columns["level"], found.columns["answer"]) == ("p", 0, "3")
    else:
        assert isinstance(found, Demonstration) and found.completion in ("La.", "A lark.")


def test_every_format_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in FORMATS:
        assert f"`{name}`" in page


def test_a_prompt_by_another_name_is_told_its_mapping() -> None:
    with pytest.raises(UserError) as caught:
        read({"id": 1, "question": "q", "answer": "a"}, "rows")
    assert str(caught.value) == (
        "f.jsonl:1: no column 'prompt'; found id, question, answer; "
        "data.columns.prompt=question reads its column 'question'"
    )
