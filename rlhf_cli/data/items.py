"""What rows become: sequences, prompts and answers in token ids."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, overload

from rlhf_cli.data.kinds import Prompt

Item = TypeVar("Item")


class Judged(Protocol):
    """Responses to one prompt, in token ids."""

    @property
    def prompt(self) -> list[int]:
        """That they respond to."""

    @property
    def responses(self) -> list[list[int]]:
        """One or more."""


class Lazy(Sequence[Item], Generic[Item]):
    """Items that are made anew whenever they are asked for; a slice is a list of them."""

    @abstractmethod
    def at(self, place: int) -> Item:
        """The item at a place from 0."""

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        chosen = range(len(self))[place]
        return self.at(chosen) if isinstance(chosen, int) else [self.at(i) for i in chosen]


@dataclass
class Tokens:
    """One sequence: the ids of its prompt, BOS included, and of its response, EOS included.

    source: where its row stands, for messages.
    loss: which tokens of the response carry loss; None: all.
    """

    prompt: list[int]
    response: list[int]
    source: str = field(default="", compare=False)
    loss: list[bool] | None = None

    @property
    def responses(self) -> list[list[int]]:
        """The response alone: a sequence is a group of one, as in Answers."""
        return [self.response]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def response_tokens(sequences: Sequence[Tokens]) -> int:
    """Tokens that carry loss."""
    return sum(
        len(sequence.response) if sequence.loss is None else sum(sequence.loss)
        for sequence in sequences
    )


EncodedPrompt = tuple[Prompt, list[int]]
"""A row to respond to, and the ids of its prompt."""


@dataclass
class Answers:
    """K responses to one prompt, in the order of the row that judges them.

    Prompt and responses as in Tokens; no response is empty.

    ends: for steps, the place of the last token of each step in the one response.
    """

    prompt: list[int]
    responses: list[list[int]]
    row: Any
    ends: list[int] = field(default_factory=list)

    @property
    def sequences(self) -> list[Tokens]:
        """Each response with the prompt."""
        return [Tokens(self.prompt, response, self.source) for response in self.responses]

    @property
    def source(self) -> str:
        """Where the row stands, for messages; empty of pairs that no row has."""
        return getattr(self.row, "source", "")

    def __len__(self) -> int:
        """The longest sequence, in tokens."""
        return len(self.prompt) + max(map(len, self.responses))


Encoded = Tokens | Answers | EncodedPrompt


def responses_in(item: Judged) -> int:
    """Sequences that an item takes in a batch."""
    return len(item.responses)


def tokens_in(items: Iterable[Judged]) -> int:
    """Tokens of all sequences of items, each with its prompt."""
    return sum(
        responses_in(item) * len(item.prompt) + sum(map(len, item.responses)) for item in items
    )
