"""Requests for /v1/completions of a vLLM server, and what its answers say; ids in, ids out.

vLLM fills what a request leaves out from the generation_config.json of the model that it serves, so
nothing is left out. A response ends at the ids that end one here (`ignore_eos` with
`stop_token_ids`), and never at others. Log-probs are those of `--logprobs-mode processed_logprobs`:
after temperature, penalties and filters, of the distribution that was drawn from.
"""

import math
from typing import Any

from rlhf_cli.rollout.decode import Completion
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.server_client import ServerFault

NEVER = -100.0  # the least that a logit_bias takes
PASSING = ("abort", "error")  # how a request ends that another one stopped


class Stopped(Exception):
    """A server gave up a request before it came to an end."""


def request_of(
    prompt: list[int], seed: int, sampling: Sampling, stop_ids: list[int]
) -> dict[str, Any]:
    """The request for one response, but for the name of the model and the salt of its cache."""
    body: dict[str, Any] = {
        "prompt": prompt,
        "add_special_tokens": False,
        "n": 1,
        "seed": seed,
        "stream": False,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop),
        "stop_token_ids": stop_ids,
        "ignore_eos": True,
        "skip_special_tokens": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if sampling.absent:
        body["logit_bias"] = {str(id): NEVER for id in sampling.absent}
    return body


def completion_of(
    answer: Any, sampling: Sampling, stop_ids: list[int], vocabulary: int
) -> Completion:
    """The response in an answer.

    Args:
        vocabulary: ids are below this.

    Raises:
        Stopped: it was given up; asked again, it may come to an end.
        ServerFault: it is not what was asked for.
    """
    try:
        (choice,) = answer["choices"]
        reason, stopped_at = choice["finish_reason"], choice.get("stop_reason")
        if reason in PASSING or reason is None:
            raise Stopped(f"the server ended a request with {reason}")
        ids = [int(id) for id in choice["token_ids"]]
        logprobs = [float(each) for each in choice["logprobs"]["token_logprobs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerFault(
            f"the server's completion lacks what vLLM 0.30 answers to return_token_ids and "
            f"logprobs ({type(error).__name__}: {error})"
        ) from None
    ended = {"length": "length", "stop": "stop" if isinstance(stopped_at, str) else "eos"}
    fault = None
    if reason not in ended:
        fault = f"ended with {reason}"
    elif not 0 < len(ids) <= sampling.max_tokens or not all(0 <= id < vocabulary for id in ids):
        fault = f"has {len(ids)} ids, not 1 to {sampling.max_tokens} below {vocabulary}"
    elif len(logprobs) != len(ids) or not all(map(math.isfinite, logprobs)):
        fault = f"has {len(logprobs)} log-probs for {len(ids)} ids, or one that is not finite"
    elif ended[reason] == "eos" and ids[-1] not in stop_ids:
        fault = f"ended at id {ids[-1]}, and only {stop_ids} end responses of this policy"
    elif any(id in stop_ids for id in ids[:-1]):
        fault = "went on after an id that ends responses of this policy"
    if fault is not None:
        raise ServerFault(f"a response of the server {fault}")
    return Completion(ids, logprobs, ended[reason])


def scoring_request(sequence: list[int]) -> dict[str, Any]:
    """The request for the log-probs of a given sequence, at temperature 1.

    vLLM reads no prefix from its cache for it.
    """
    return {
        "prompt": sequence,
        "add_special_tokens": False,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 1,
    }


def scores_of(answer: Any, sequence: list[int]) -> list[float]:
    """The log-prob of each token of a sequence but the first.

    Raises:
        ServerFault: they are not all there.
    """
    try:
        (choice,) = answer["choices"]
        columns = choice["prompt_logprobs"][1:]
        pairs = zip(columns, sequence[1:], strict=True)
        return [float(column[str(id)]["logprob"]) for column, id in pairs]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ServerFault(
            f"the server's completion lacks what vLLM 0.30 answers to prompt_logprobs "
            f"({type(error).__name__}: {error})"
        ) from None
