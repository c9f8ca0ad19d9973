"""The engine that asks vLLM servers: ids out, ids and log-probs back, from the newest weights.

Prompts are dealt to the servers. After each batch all must still have the weights that they were
given (server_weights.py); they get them again where one was started anew meanwhile, and its share
is sampled once more. Rank 0 asks, and every rank has all responses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.batches import cut
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.decoder import embedding_rows
from rlhf_cli.models.tokenizers import ids_of_no_token
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.decode import Completion
from rlhf_cli.rollout.engine import Engine, Order
from rlhf_cli.rollout.rollouts import Rollout, as_rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.server_client import (
    IN_FLIGHT,
    TRIES,
    Client,
    ServerFault,
    dealt_to,
    each_of,
)
from rlhf_cli.rollout.server_terms import Stopped, completion_of, request_of
from rlhf_cli.rollout.server_weights import Served

ATTEMPTS = 3  # to sample a batch while the server keeps its weights
Job = tuple[list[int], int]  # the ids of a prompt, and a seed
AT_ONCE = 4 * IN_FLIGHT  # responses after which those of a run that may go on are kept


class ServerEngine(Engine):
    """Samples from servers that run, or from one of the stage's own.

    The seed of each response is one of the prompt's place and the sample's number, so that a run
    that is repeated asks the same. What vLLM answers to it hangs on what it computes beside it.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        hardware: Hardware,
        folder: Path,
        changes: bool,
        trusts: bool = False,
    ) -> None:
        """
        Args:
            folder: for weights and the log, which servers see by the same path.
            changes: whether servers that run are given the model's weights; else they are to have
                them already.
            trusts: whether code that the model brings along may run.
        """
        self._model, self._encoder = model, encoder
        self._absent = ids_of_no_token(model, encoder.tokenizer)
        self._served = Served(encoder, hardware, folder, changes, trusts)
        self._stale = True

    @property
    def exact(self) -> bool:
        """Never: other kernels round otherwise."""
        return False

    @property
    def foreign(self) -> bool:
        """Always."""
        return True

    def update(self, model: nn.Module) -> None:
        """The next sample is drawn from the weights that this module has by then."""
        self._model, self._stale = model, True

    def _made(self, order: Order) -> Iterator[dict[int, list[Rollout]]]:
        """A request for each response; where they are kept, some prompts at a time."""
        sampling, samples = replace(order.sampling, absent=self._absent), order.samples
        groups = (
            cut(order.left, AT_ONCE, lambda place: samples) if order.resumable else [order.left]
        )
        for places in filter(None, groups):
            jobs = [
                (order.prompts[place][1], derived_seed(order.seed, order.first + place, number))
                for place in places
                for number in range(samples)
            ]
            drawn = iter(self._drawn(jobs, samples, sampling, order.advance))
            yield {
                place: [
                    as_rollout(*order.prompts[place], next(drawn), self._encoder, sampling)
                    for _ in range(samples)
                ]
                for place in places
            }

    def _drawn(
        self,
        jobs: Sequence[Job],
        samples: int,
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> list[Completion]:
        """A response to the ids of each job by its seed, all from the newest weights.

        A server that has lost them meanwhile is asked again for what was its share.

        Args:
            samples: of one prompt, in a row.
        """
        found: dict[int, Completion] = {}
        told = 0

        def tell(done: int) -> None:
            nonlocal told
            advance(max(0, done - told))  # what is sampled again was told of before
            told = max(done, told)

        for _ in range(ATTEMPTS):
            self._served.bring_up_to_date(self._model, [ids for ids, _ in jobs], self._stale)
            self._stale = False
            left = [place for place in range(len(jobs)) if place not in found]
            answers = by_main(lambda left=left: self._asked(jobs, left, samples, sampling, tell))  # type: ignore[misc]
            for place, fields in answers:
                found[place] = self._checked(Completion(*fields), sampling)
            if len(found) == len(jobs):
                tell(len(jobs))
                return [found[place] for place in range(len(jobs))]
            say("a server has lost the weights of this run while it sampled: it gets them again")
            self._stale = True
        raise RunError(
            f"a server has lost the weights of this run {ATTEMPTS} times while it sampled: it is "
            "started anew again and again, or another run gives it weights"
        )

    def _asked(
        self,
        jobs: Sequence[Job],
        left: Sequence[int],
        samples: int,
        sampling: Sampling,
        tell: Callable[[int], None],
    ) -> list[Any]:
        """The places of jobs among all, with the fields of their completions; those of servers that
        have other weights by now are missing.
        """
        self._check_room(jobs, sampling)
        stop_ids, vocabulary = self._encoder.stop_ids, embedding_rows(self._model)
        servers = {id(server.client): server for server in self._served.servers}

        def ask(client: Client, place: int) -> Completion:
            request = request_of(*jobs[place], sampling, stop_ids)
            body = self._served.named(servers[id(client)], request)
            for _ in range(TRIES):
                answer = client.post("/v1/completions", body)
                try:
                    return completion_of(answer, sampling, stop_ids, vocabulary)
                except Stopped as stopped:
                    reason = str(stopped)
            raise ServerFault(f"{client.url}: {reason}, {TRIES} times")

        found: dict[int, Completion] = {}
        clients = [server.client for server in self._served.servers]
        unknown: ServerFault | None = None
        try:
            for turn, each in each_of(clients, ask, left, samples):
                found[turn] = each
                tell(len(jobs) - len(left) + len(found))
        except ServerFault as fault:
            if fault.status != 404:
                raise
            unknown = fault  # the adapter that was given to a server before it was started anew
        lost = self._served.have_lost()
        if unknown is not None and not lost:
            raise unknown
        return [
            [left[turn], [each.ids, each.logprobs, each.finish_reason]]
            for turn, each in found.items()
            if dealt_to(turn, samples, len(clients)) not in lost
        ]

    def _check_room(self, jobs: Sequence[Job], sampling: Sampling) -> None:
        longest = max(len(ids) for ids, _ in jobs) + sampling.max_tokens
        room = self._served.longest
        if room and longest > room:
            raise RunError(
                f"{', '.join(self._served.urls)} takes {room} tokens of a sequence, and prompt and "
                f"response may be {longest}: start it with --max-model-len {longest}, or lower "
                "data.max_prompt_tokens or algo.max_tokens"
            )

    def _checked(self, completion: Completion, sampling: Sampling) -> Completion:
        """A text that the server ended at a string has it here, too."""
        if completion.finish_reason == "stop":
            text = self._encoder.text(completion.ids)
            if not any(string in text for string in sampling.stop):
                raise RunError(
                    "the server found a string of algo.stop in a response that has none of them "
                    "here: it reads ids by another tokenizer than the policy's"
                )
        return completion
