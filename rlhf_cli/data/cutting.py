"""Prompts and responses over their limits are cut, dropped or refused."""

from collections import Counter
from itertools import combinations
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.kinds import Preference, Ranking, reply_key
from rlhf_cli.data.limits import Lengths, Limits
from rlhf_cli.data.text_ids import TextIds
from rlhf_cli.data.writing import Written


class Cutter:
    """Does what data.long_prompts, long_responses and doubtful_pairs say, and counts it.

    long_prompts: what is done with a prompt over the limit: cut, drop or error.
    """

    def __init__(
        self,
        data: Data,
        prefixed: bool,
        limits: Limits,
        ids: TextIds,
        lengths: Lengths,
        counts: Counter[str],
    ) -> None:
        """For one encoder, whose ids, lengths and counts these are.

        Args:
            prefixed: whether a text stands before every prompt; such prompts are never cut.
        """
        self._data, self._prefixed, self._limits = data, prefixed, limits
        self._ids, self._lengths, self._counts = ids, lengths, counts
        self.long_prompts = "error" if prefixed else data.long_prompts

    def prompt(self, ids: list[int], text: Written, row: Any) -> list[int] | None:
        """The ids of a prompt within the limit; None drops its row.

        Args:
            ids: of a longer one not all, but more than the limit.

        Raises:
            UserError: it is longer, and data.long_prompts is error.
        """
        limit = self._limits.prompt
        if limit is None or len(ids) <= limit:
            self._lengths.prompt = max(self._lengths.prompt, len(ids))
            return ids
        if self.long_prompts == "error":
            count = len(self._ids.of(text.prompt)) + len([] if text.chat else self._ids.before)
            remedy = "raise data.max_prompt_tokens or set data.long_prompts=cut or drop"
            if self._prefixed:
                remedy = "data.prefix is too long for the model, or the row is"
            raise UserError(
                f"{row.source}: the prompt has {count} tokens, the limit is {limit}; {remedy}"
            )
        self._counts[f"prompts over max_prompt_tokens: {self.long_prompts}"] += 1
        if self.long_prompts == "drop":
            self._lengths.drop(row, f"a prompt is longer than data.max_prompt_tokens={limit}")
            return None
        start = self._ids.before
        if text.chat:
            begin = self._ids.begin_text
            start = self._ids.begin if begin and text.prompt.startswith(begin) else []
        start = start[: limit - 1]
        return start + ids[len(ids) - limit + len(start) :]  # the end holds the question

    def responses(
        self, responses: list[list[int]], limit: int | None, row: Any
    ) -> list[list[int]] | None:
        """The responses of a row within a limit; None drops the row.

        Raises:
            UserError: one is longer, and data.long_responses is error.
        """
        self._lengths.responses += len(responses)
        longest = max(map(len, responses))
        if limit is None or longest <= limit:
            self._lengths.response = max(self._lengths.response, longest)
            return responses
        how = self._data.long_responses
        if how == "error":
            raise UserError(
                f"{row.source}: a response has {longest} tokens or more, the limit is {limit}; "
                "raise data.max_response_tokens or set data.long_responses=cut or drop"
            )
        if how == "drop":
            self._counts["rows with a response over max_response_tokens: drop"] += 1
            self._lengths.drop(row, f"a response is longer than data.max_response_tokens={limit}")
            return None
        over = sum(len(each) > limit for each in responses)
        self._lengths.cut += over
        self._lengths.response = limit
        self._counts["responses cut to max_response_tokens (their EOS is lost)"] += over
        return [each[:limit] for each in responses]

    def made_equal(self, row: Any, ids: list[list[int]]) -> bool:
        """Whether a row is dropped because its better and its worse side were cut to the same.

        Raises:
            UserError: they were, and data.doubtful_pairs is error.
        """
        if not isinstance(row, Preference | Ranking) or len(set(map(tuple, ids))) == len(ids):
            return False
        if isinstance(row, Preference):
            sides, ranks = [row.chosen, row.rejected], [1.0, 2.0]
        else:
            sides, ranks = row.responses, row.ranks
        keys = list(map(reply_key, sides))
        if not any(
            ids[i] == ids[j] and ranks[i] != ranks[j] and keys[i] != keys[j]
            for i, j in combinations(range(len(ids)), 2)
        ):
            return False
        doubtful = self._data.doubtful_pairs
        if doubtful == "error":
            raise UserError(
                f"{row.source}: two sides have the same tokens once they are cut to "
                "data.max_response_tokens; raise it, or data.doubtful_pairs=keep or drop goes on"
            )
        self._counts[f"rows whose sides are equal once they are cut: {doubtful}"] += 1
        if doubtful == "drop":
            self._lengths.drop(row, "the sides of a row are equal once they are cut")
        return doubtful == "drop"
