"""Which replies of a dialogue carry loss, and where they stand in its text."""

from collections import Counter
from dataclasses import replace
from typing import Any

from rlhf_cli.data.chat import ChatTemplate
from rlhf_cli.data.kinds import Demonstration, Turns
from rlhf_cli.data.limits import Lengths
from rlhf_cli.data.templates import replied
from rlhf_cli.data.text_ids import Span

END = 2**62  # of a text, whatever its length
LEARNT = "earlier replies carry loss as well as the last (data.loss_on=last: the last alone)"
REWRITTEN = (
    "earlier replies carry no loss: the chat template writes them otherwise once the dialogue goes "
    "on, and only the last reply of such a row is learnt"
)


class LearntReplies:
    """The replies that data.loss_on and the weights of messages choose.

    Those without loss are counted in `counts`, and rows that have no other in `lengths`.
    """

    def __init__(self, loss_on: str, counts: Counter[str], lengths: Lengths) -> None:
        self._last_alone = loss_on == "last"
        self._counts, self._lengths = counts, lengths

    def up_to_last(self, row: Demonstration) -> Demonstration | None:
        """The row up to its last reply that carries loss; None where none does."""
        if isinstance(row.completion, str) or row.completion.get("weight", 1):
            return row
        self._counts["replies of weight 0 carry no loss"] += 1
        turns = row.prompt if isinstance(row.prompt, list) else []
        places = self.earlier(row, replied(turns, row.completion))
        if not places or self._last_alone:
            self._counts["rows have no reply that carries loss: drop"] += 1
            self._lengths.drop(row, "a row has no reply that carries loss")
            return None
        last = places[-1]
        return replace(row, prompt=turns[:last], completion=turns[last])

    def earlier(self, row: Demonstration, dialogue: Turns) -> list[int]:
        """The places of the replies before the last message that are to carry loss.

        Args:
            dialogue: the messages of the row with its reply, as they are written.
        """
        return [i for i in _earlier(row, dialogue) if dialogue[i].get("weight", 1)]

    def spans(
        self, chat: ChatTemplate, row: Demonstration, dialogue: Turns, asked: str, tools: Any
    ) -> list[Span] | None:
        """Where the replies of a dialogue that carry loss stand in its text, and are counted.

        Args:
            dialogue: as of `earlier`.
            asked: the text before the reply with which it ends.

        Returns:
            As of `Written`.
        """
        earlier, wanted = _earlier(row, dialogue), self.earlier(row, dialogue)
        if self._last_alone:
            self._count(len(earlier), "earlier replies carry no loss (data.loss_on=last)")
            wanted = []
        else:
            self._count(len(earlier) - len(wanted), "replies of weight 0 carry no loss")
        marked = chat.marked_spans(dialogue, asked, tools, row.source) if chat.marks else None
        if marked is not None:
            replies = [i for i, turn in enumerate(dialogue) if turn["role"] == "assistant"]
            self._count(len(wanted), LEARNT)
            start, end = marked[-1]
            own = (max(start, len(asked)), end)
            return [*(marked[replies.index(i)] for i in wanted), own]
        if not wanted:
            return None
        spans = chat.earlier_spans(dialogue, wanted, asked, tools, row.source)
        if spans is None:
            self._count(len(wanted), REWRITTEN)
            return None
        self._count(len(wanted), LEARNT)
        return [*spans, (len(asked), END)]

    def _count(self, number: int, what: str) -> None:
        if number:  # what is counted is told
            self._counts[what] += number


def _earlier(row: Demonstration, dialogue: Turns) -> list[int]:
    """The places of the replies before the last message that the row gives to learn from."""
    return [
        i for i in range(row.learn_from, len(dialogue) - 1) if dialogue[i]["role"] == "assistant"
    ]
