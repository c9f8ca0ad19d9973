"""How long prompts and responses may be, and what is counted of those that are longer."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data

MOST_CUT = 0.05  # share of responses that may lose their end unasked
SAMPLED = 256  # tokens of a sampled response where nothing says how long one is


@dataclass(frozen=True)
class Limits:
    """The limits of one encoder, in tokens; None where there is none.

    A limit that data does not give is what the model's positions leave: prompt and response
    together are at most `context`.

    prompt: of a prompt.
    context: positions of the model.
    given: data.max_response_tokens.
    """

    prompt: int | None
    given: int | None
    context: int | None

    @classmethod
    def of(cls, data: Data, context: int | None, room: int) -> "Limits":
        """Those of a config; `room` is what must be left for a response that is sampled."""
        prompt, given = data.max_prompt_tokens, data.max_response_tokens
        if prompt is None and context is not None:
            prompt = max(1, context - max(given or 1, room))
        return cls(prompt, given, context)

    def response(self, prompt: int) -> int | None:
        """Of the response to a prompt of so many tokens."""
        if self.given is not None or self.context is None:
            return self.given
        return max(1, self.context - prompt)

    @property
    def longest_response(self) -> int | None:
        """Of any response."""
        return self.given if self.given is not None else self.context

    @property
    def document(self) -> int | None:
        """Of a sequence of plain text."""
        if self.prompt is not None and self.given is not None:
            return self.prompt + self.given
        return self.context


@dataclass
class Lengths:
    """What an encoder has seen.

    responses, cut: how many responses there were, and how many lost their end.
    prompt, response: tokens of the longest that was kept.
    rows: how many rows there were.
    dropped: why rows were left out -> how many; `first` is where the first of them stands.
    """

    responses: int = 0
    cut: int = 0
    prompt: int = 0
    response: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def lines(self, limits: Limits) -> list[str]:
        """How long rows are beside the limits, in a line."""
        if not self.prompt:
            return []
        told = f"longest prompt {self.prompt} tokens{_of(limits.prompt)}"
        if self.response:
            told += f", longest response {self.response}{_of(limits.given)}"
        if limits.context is not None and limits.given is None:
            told += f"; prompt and response have {limits.context} positions of the model"
        return [told]

    def drop(self, row: Any, why: str) -> None:
        """A row is left out."""
        self.first = self.first or row.source
        self.dropped[why] += 1

    def check(self, data: Data, limits: Limits) -> None:
        """Stop where no row is left, or many responses are cut and nobody asked for it.

        Raises:
            UserError: with the keys that decide.
        """
        if self.rows and self.dropped.total() >= self.rows:
            why = "; ".join(self.dropped)
            raise UserError(f"{self.first}: nothing is left of {self.rows} rows: {why}")
        if data.long_responses is not None or self.cut <= MOST_CUT * self.responses:
            return
        limit = limits.given
        what = f"data.max_response_tokens={limit}"
        if limit is None:
            what = f"what the model's {limits.context} positions leave after the prompt"
        raise UserError(
            f"{self.cut} of {self.responses} responses are longer than {what} and would lose their "
            "end; raise data.max_response_tokens, or set data.long_responses=drop, or cut to learn "
            "from responses that do not end"
        )


def _of(limit: int | None) -> str:
    return "" if limit is None else f" of at most {limit}"


def sampled_tokens(given: int | None, learnt: int | None, context: int | None) -> int:
    """How long a sampled response may be where algo.max_tokens does not say it.

    Args:
        given: data.max_response_tokens.
        learnt: the longest response that the policy learnt from.
        context: positions of the model; half of them are left for the prompt.
    """
    if given is not None:
        return given
    wanted = learnt or SAMPLED
    return wanted if context is None else max(1, min(wanted, context // 2))
