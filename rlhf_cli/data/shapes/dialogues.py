"""Instructions and conversations."""

from rlhf_cli.data.columns import PAIR, column, is_given
from rlhf_cli.data.messages import text_of, turns_of
from rlhf_cli.data.raw import Raw, RowError
from rlhf_cli.data.readers import items_of
from rlhf_cli.data.shapes.shape import given, reads

THUMBS_OF = ("label", "kto_tag")


@reads("instruction", "input", "output", "history", *THUMBS_OF, *PAIR)
def alpaca(raw: Raw, source: str) -> Raw:
    """Stanford's instructions; `history` and pairs as LLaMA-Factory has them.

    The input follows its instruction after a blank line.
    """
    asked = text_of(raw, "instruction", source)
    if is_given(raw, "input") and str(raw["input"]).strip():
        asked += "\n\n" + text_of(raw, "input", source)
    history = items_of(raw, "history", source) if is_given(raw, "history") else []
    turns = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(f"{source}: column 'history' must hold pairs of question and reply")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    if is_given(raw, "chosen") or is_given(raw, "rejected"):
        prompt = [*turns, {"role": "user", "content": asked}] if turns else asked
        return {"prompt": prompt, **given(raw, "chosen", "rejected")}
    reply = text_of(raw, "output", source)
    if turns:
        last = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        return {"messages": [*turns, *last], **thumb(raw)}
    return {"prompt": asked, "completion": reply, **thumb(raw)}


def thumb(raw: Raw) -> Raw:
    """A judgement as LLaMA-Factory's rows have it."""
    return {"label": raw["kto_tag"]} if is_given(raw, "kto_tag") else given(raw, "label")


@reads("conversations", "conversation", *THUMBS_OF, *PAIR)
def sharegpt(raw: Raw, source: str) -> Raw:
    """Conversations; with `chosen` and `rejected` they end in the question, as in LLaMA-Factory."""
    name = "conversation" if is_given(raw, "conversation") else "conversations"
    turns = turns_of(column(raw, name, source), name, source)
    if is_given(raw, "chosen") or is_given(raw, "rejected"):
        if turns[-1]["role"] == "assistant":
            raise RowError(
                f"{source}: column {name!r} ends in a reply; beside chosen and rejected it must "
                "end in what they answer"
            )
        return {"prompt": turns, **given(raw, "chosen", "rejected")}
    if turns[-1]["role"] != "assistant":
        raise RowError(f"{source}: column {name!r} must end in a reply of the assistant")
    return {"messages": turns, **thumb(raw)}
