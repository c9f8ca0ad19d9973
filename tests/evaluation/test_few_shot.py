"""Prompts that hold demonstrations, as text and as turns of a dialogue."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Demonstration, Prompt
from rlhf_cli.data.rows import Rows
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evaluation.few_shot import Shots
from rlhf_cli.models.tokenizers import load_tokenizer
from tests.tiny import DATA

pytestmark = pytest.mark.usefixtures("inside")


def encoder(*more: str) -> Encoder:
    cfg: Any = compose("evaluate", [*DATA, "policy=runs/demo/sft", *more])
    return Encoder(load_tokenizer("runs/demo/sft", cfg.model), cfg.data)


def shots(*pairs: tuple[str, str]) -> Shots:
    return Shots([Demonstration(prompt, reply) for prompt, reply in pairs])


def test_text_has_demonstrations_as_its_template_writes_them() -> None:
    found, end = shots(("1 + 1", "2"), ("2 + 2", "4 ")).asked(
        [Prompt("3 + 3", {"answer": "6"})], encoder('data.template="Q: {prompt}\\nA: "')
    )
    assert found[0].prompt == "Q: 1 + 1\nA: 2\n\nQ: 2 + 2\nA: 4\n\nQ: 3 + 3\nA: "
    assert (end, found[0].columns) == ("\n\n", {"answer": "6"})


def test_what_ends_a_response_stands_in_no_demonstration() -> None:
    _, end = shots(("a", "b\n\nc")).asked([Prompt("d")], encoder("data.template=null"))
    assert end == "\n\n###\n\n"
    with pytest.raises(UserError, match="hold both"):
        shots(("a\n\n###\n\n", "b")).asked([Prompt("d")], encoder("data.template=null"))


def test_dialogues_have_demonstrations_as_turns_after_their_system_message() -> None:
    chat = encoder("data.chat_template=chatml", "data.template=chat")
    own = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    found, end = shots(("a", "b")).asked([Prompt(own), Prompt("t")], chat)
    roles = [(turn["role"], turn["content"]) for turn in found[0].prompt]  # type: ignore[index]
    assert roles == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "q")]
    assert [turn["content"] for turn in found[1].prompt] == ["a", "b", "t"]  # type: ignore[index]
    assert end is None


def test_demonstrations_come_from_a_file_or_are_the_first_to_learn_from(tmp_path: Path) -> None:
    cfg: Any = compose("evaluate", [*DATA, "policy=runs/demo/sft"])
    rows = Rows(cfg.data)
    assert len(Shots.of("3", rows).rows) == 3
    held_out = {row.prompt for row in rows.held_out(Demonstration).held_out}
    assert not held_out & {row.prompt for row in Shots.of("20", rows).rows}
    with pytest.raises(UserError, match="few_shot=900: data has"):
        Shots.of("900", rows)
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n')
    assert [row.completion for row in Shots.of(str(file), rows).rows] == ["c"]
