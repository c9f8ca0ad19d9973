"""An endpoint with the chat route of OpenAI's API; no key is written anywhere."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rlhf_cli.evaluation.judgements import TOKENS
from rlhf_cli.folders.json_forms import COUNT, Form, misfit
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.server_client import OK, Client, ServerFault

TOLD = 3  # failures that are told one by one
CHOICE: Form = {"message": {"content?": (str, None)}, "finish_reason?": (str, None)}
ANSWER: Form = {"choices": [CHOICE]}
USAGE: Form = {"usage?": ({f"{name}?": (COUNT, None) for name in TOKENS}, None)}

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class ChatRoute:
    """Asks one model there; may be used by many threads at once."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        keys: Sequence[str],
        timeout: float,
        limited_by: str,
        at_once: int,
    ) -> None:
        """
        Args:
            keys: the variables that the key of the endpoint may stand in; the first that is set.
            timeout: seconds for a request with all that it is tried again.
            limited_by: the key that the timeout comes from.
            at_once: requests at once.
        """
        key = next((name for name in keys if os.environ.get(name)), keys[0])
        self._client = Client(
            url.rstrip("/"), timeout, key_of=key, limited_by=limited_by, at_once=at_once
        )
        self._model = model

    @property
    def url(self) -> str:
        """The address."""
        return self._client.url

    def ask(self, text: str, **options: Any) -> Any:
        """What it answers to one message of the user's, as JSON.

        Raises:
            ServerFault: it does not, or not in time, or no object.
        """
        messages = [{"role": "user", "content": text}]
        body = {"model": self._model, "messages": messages, **options}
        return self._as_asked(self._client.post("/chat/completions", body), {})

    def choice(self, answer: Any) -> dict[str, Any]:
        """The first choice of an answer: `message`, its `content` a text, null or absent, and more.

        Raises:
            ServerFault: there is none, or it has another shape.
        """
        choices: list[dict[str, Any]] = self._as_asked(answer, ANSWER)["choices"]
        if not choices:
            raise self._otherwise("choices is empty")
        return choices[0]

    def usage(self, answer: dict[str, Any]) -> dict[str, Any]:
        """How many tokens were read and written, by the names of `TOKENS`, as far as it tells.

        Raises:
            ServerFault: they are no numbers of tokens.
        """
        usage: dict[str, Any] = self._as_asked(answer, USAGE).get("usage") or {}
        return usage

    def _as_asked(self, answer: Any, form: Form) -> Any:
        if (fault := misfit(answer, form)) is not None:
            raise self._otherwise(fault)
        return answer

    def _otherwise(self, fault: str) -> ServerFault:
        return ServerFault(f"{self.url} answered otherwise than asked: {fault}", OK)

    def each(
        self, work: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        """The place of each item and what `work`, which asks this route, gives, as they come."""
        return self._client.each(work, items)


def tell_failures(what: str, failures: Sequence[str], calls: int) -> None:
    """Say why calls have failed: of the first few, and how many more there are.

    Args:
        what: is missing, and of whom.
        calls: how many there were.
    """
    for line in failures[:TOLD]:
        say(f"{what}: {line}")
    if len(failures) > TOLD:
        say(f"{what} in {len(failures) - TOLD} more of {calls} calls")
