"""Judged responses as a preference loss sees them."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.algorithms import DpoAlgo
from rlhf_cli.config.schema.stages import DpoConfig
from rlhf_cli.data.items import Answers, Lazy, Tokens
from rlhf_cli.data.kinds import Feedback, Ranking
from rlhf_cli.data.order import order_of
from rlhf_cli.data.store import prompts_of
from rlhf_cli.data.streaming import Stream
from rlhf_cli.objectives.preference import kto_weights


@dataclass
class Compared:
    """Responses to one prompt, which a policy is compared with its reference on.

    reference: (K,) log-probs of the responses under the reference, once they are known.
    """

    answers: Answers
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def prompt(self) -> list[int]:
        """Ids of the prompt."""
        return self.answers.prompt

    @property
    def responses(self) -> list[list[int]]:
        """Ids of the responses."""
        return self.answers.responses

    @property
    def source(self) -> str:
        """Where the row stands, for messages."""
        return self.answers.source


@dataclass
class PreferenceItem(Compared):
    """The responses that a row judges, and what the loss compares them with.

    mismatched: kto: the row's prompt with the response of another row, for the baseline z0.
    """

    mismatched: Compared | None = None

    @property
    def best(self) -> int:
        """Place of the best response; kto: of the only one."""
        row = self.answers.row
        return row.ranks.index(min(row.ranks)) if isinstance(row, Ranking) else 0

    @property
    def worst(self) -> int:
        """Place of the worst response, the last of several."""
        row = self.answers.row
        if isinstance(row, Ranking):
            return max(range(len(row.ranks)), key=lambda i: (row.ranks[i], i))
        return len(self.answers.responses) - 1

    @property
    def is_good(self) -> bool:
        """Whether `best` is a response to imitate: kto's bad ones are not."""
        row = self.answers.row
        return not isinstance(row, Feedback) or bool(row.label)


class PreferenceItems(Lazy[PreferenceItem]):
    """An item per row, made anew whenever it is asked for; what the reference says is kept.

    kto's have a partner: the response of the next row in a shuffled order. The paper pairs within a
    batch. A partner that stays lets the reference score it once, and z0 has the same expectation.
    """

    def __init__(self, answers: Sequence[Answers], cfg: DpoConfig, side: str) -> None:
        """Raises UserError where all rows have one prompt, so that kto has no partners."""
        self.answers = answers
        self._partner = partners(answers, cfg.seed, side) if cfg.algo.loss == "kto" else None
        self._known: dict[int, Tensor] = {}
        self._known_of_partner: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.answers)

    def at(self, place: int) -> PreferenceItem:
        """The item at a place from 0."""
        answers = self.answers[place]
        item = PreferenceItem(answers, self._known.get(place))
        if self._partner is not None:
            responses = self.answers[self._partner[place]].responses
            others = Answers(answers.prompt, responses, answers.row)
            item.mismatched = Compared(others, self._known_of_partner.get(place))
        return item

    def remember(self, place: int, item: PreferenceItem) -> None:
        """Keep what the reference says of an item, and of its partner."""
        if item.reference is not None:
            self._known[place] = item.reference
        if item.mismatched is not None and item.mismatched.reference is not None:
            self._known_of_partner[place] = item.mismatched.reference


def items_of(
    answers: Sequence[Answers] | Stream[Answers], cfg: DpoConfig, side: str
) -> PreferenceItems | Stream[PreferenceItem]:
    """Items of rows that are all known, or that come while the run goes on.

    Raises:
        UserError: kto has no partners.
    """
    if isinstance(answers, Stream):
        return answers.mapped(PreferenceItem)
    return PreferenceItems(answers, cfg, side)


def partners(answers: Sequence[Answers], seed: int, side: str) -> "array[int]":
    """(N,) the row whose response each is compared with: one of another prompt.

    Raises:
        UserError: there is none.
    """
    count = len(answers)
    prompts = prompts_of(answers)
    order = order_of(count, seed, "kto partners", 0)
    found = array("q", [0]) * count
    for place, i in enumerate(order):
        after = (order[(place + step) % count] for step in range(1, count))
        partner = next((other for other in after if prompts[other] != prompts[i]), None)
        if partner is None:
            raise UserError(
                f"all {side} rows have one prompt; kto compares with responses to other prompts"
            )
        found[i] = partner
    return found


def with_partners(items: Sequence[PreferenceItem]) -> list[Compared]:
    """Items and, for kto, their partners: all that the reference scores."""
    return [*items, *(item.mismatched for item in items if item.mismatched is not None)]


def good_sequences(items: Sequence[PreferenceItem]) -> list[Tokens]:
    """What SFT on the chosen side imitates."""
    return [item.answers.sequences[item.best] for item in items if item.is_good]


def class_weights(
    items: PreferenceItems | Stream[PreferenceItem], algo: DpoAlgo
) -> tuple[float, float]:
    """kto's lambda_D and lambda_U: those given, or else what balances the classes.

    Raises:
        UserError: all rows have one label.
    """
    if algo.loss != "kto" or isinstance(items, Stream):
        return 1.0, 1.0
    if algo.desirable_weight is not None and algo.undesirable_weight is not None:
        return algo.desirable_weight, algo.undesirable_weight
    good = sum(item.is_good for item in items)
    if good in (0, len(items)):
        raise UserError(
            f"all {len(items)} rows are labelled {str(bool(good)).lower()}; kto needs both labels, "
            "or algo.desirable_weight and algo.undesirable_weight"
        )
    return kto_weights(good, len(items) - good)
