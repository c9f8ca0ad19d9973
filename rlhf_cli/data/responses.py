"""Responses that exist: rows of prompt and response, as samples.jsonl has them."""

from collections.abc import Iterator

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.files import find
from rlhf_cli.data.kinds import Turns
from rlhf_cli.data.messages import check_characters, turns_of
from rlhf_cli.data.parse import rows_of_file
from rlhf_cli.data.raw import Raw


def responses_of(path: str) -> Iterator[tuple[Raw, str, str | Turns, str, str]]:
    """Each row of a file, a folder or a pattern, with who wrote it, its prompt, response and place.

    Without a `policy` the file is who wrote it.

    Raises:
        UserError: a row lacks prompt or response, its prompt is no dialogue, or half a character is
            in them.
    """
    for file in find(path).train:
        for raw, place in rows_of_file(file):
            if isinstance(raw, UserError):
                raise raw
            prompt, text = raw.get("prompt"), raw.get("response")
            if not isinstance(prompt, str | list) or not isinstance(text, str):
                raise UserError(f"{place}: needs prompt and response, as samples.jsonl has them")
            policy = str(raw.get("policy") or file.stem)
            if isinstance(prompt, list):
                prompt = turns_of(prompt, "prompt", place)
            else:
                check_characters(prompt, "prompt", place)
            check_characters(text, "response", place)
            check_characters(policy, "policy", place)
            yield raw, policy, prompt, text, place
