"""A language model that writes critiques and revisions: a policy, or an endpoint.

What it has written is kept where resume points are: a run that was ended goes on from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.judge_rules import is_address
from rlhf_cli.config.schema.stages import GenerateConfig
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.templates import CHAT, PLAIN
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evaluation.chat_route import ChatRoute, tell_failures
from rlhf_cli.evaluation.kept import stop_if_asked
from rlhf_cli.models.positions import positions_of
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import Bar
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.server_client import BUSY, ServerFault
from rlhf_cli.runs.policy import Policy

KEYS = ("REVISER_API_KEY", "OPENAI_API_KEY")
"""The variables that the key of an endpoint may stand in; the first that is set."""

CUT = ("length", "content_filter")  # reasons for which an endpoint ends what is not whole
NO_TOKENS = Tokens([], [], "")
KEPT = "what was revised is kept"


class Said(NamedTuple):
    """What a reviser has written; ended: by itself, neither at max_tokens nor by a filter."""

    text: str
    ended: bool


Written = dict[int, Said]
"""By the place of the request."""


class Reviser(Protocol):
    """Writes what it is asked for."""

    def write(
        self,
        requests: Sequence[str],
        done: Mapping[int, Said],
        keep: Callable[[Mapping[int, Said]], None],
        seed: int,
        bar: Bar,
    ) -> Written:
        """Without those that failed.

        Args:
            done: by place what was written before.
            keep: is given more of it as it comes, on rank 0.
            seed: with the place of a request fixes what is drawn.
        """


class LocalReviser:
    """A policy in this process, by the sampling options of the stage."""

    def __init__(self, policy: Policy, cfg: GenerateConfig) -> None:
        data = replace(
            cfg.data,
            template=CHAT if policy.tokenizer.chat_template else PLAIN,
            chat_template=None,
            max_prompt_tokens=None,
            long_prompts="error",
        )
        room = cfg.algo.sampled_tokens
        self._encoder = Encoder(policy.tokenizer, data, positions_of(policy.model), room)
        self._encoder.ends_with(policy.stop_ids)
        self._policy = Policy.of(policy.model, self._encoder, cfg.hardware)
        self._cfg = cfg

    def write(
        self,
        requests: Sequence[str],
        done: Mapping[int, Said],
        keep: Callable[[Mapping[int, Said]], None],
        seed: int,
        bar: Bar,
    ) -> Written:
        """Sampled.

        Raises:
            UserError: a request is too long for the policy.
        """
        rows = [Prompt(text) for text in requests]
        try:
            prompts = self._encoder.prompts(rows)
        except UserError as error:
            fault = str(error).lstrip(": ").partition(";")[0]
            raise UserError(
                f"reviser={self._cfg.reviser or self._cfg.policy} cannot read a request: {fault}; "
                "give a shorter critique_prompt and revision_prompt, or a reviser that reads more"
            ) from None
        rollouts = self._policy.engine.sample(
            prompts,
            Sampling.of(self._cfg.algo),
            seed=seed,
            advance=bar.advance,
            kept=_KeptAs(rows, done, keep),
        )
        return {place: said_by(rollout) for place, rollout in enumerate(rollouts)}


def said_by(rollout: Rollout) -> Said:
    """A rollout as what was written."""
    return Said(rollout.text, rollout.ended)


class _KeptAs:
    """What is kept of a reviser, as an engine asks for it and gives it."""

    def __init__(
        self,
        rows: Sequence[Prompt],
        done: Mapping[int, Said],
        keep: Callable[[Mapping[int, Said]], None],
    ) -> None:
        self.done: Mapping[int, list[Rollout]] = {
            place: [Rollout(rows[place], NO_TOKENS, [], "eos" if ended else "length", text)]
            for place, (text, ended) in done.items()
        }
        self._keep = keep

    def keep(self, made: Mapping[int, list[Rollout]]) -> None:
        said = {place: said_by(rollout) for place, (rollout,) in made.items()}
        by_main(lambda: self._keep(said))
        stop_if_asked(KEPT)


class EndpointReviser:
    """A server with the chat route of OpenAI's API; rank 0 alone asks."""

    def __init__(self, cfg: GenerateConfig) -> None:
        assert cfg.reviser is not None and cfg.reviser_model is not None
        self._route = ChatRoute(
            *(cfg.reviser, cfg.reviser_model),
            keys=KEYS,
            timeout=cfg.reviser_timeout,
            limited_by="reviser_timeout",
            at_once=cfg.reviser_concurrency,
        )
        algo = cfg.algo
        self._options: dict[str, Any] = {
            "temperature": algo.temperature,
            "top_p": algo.top_p,
            "max_tokens": algo.sampled_tokens,
            **({"stop": algo.stop} if algo.stop else {}),
        }

    def write(
        self,
        requests: Sequence[str],
        done: Mapping[int, Said],
        keep: Callable[[Mapping[int, Said]], None],
        seed: int,
        bar: Bar,
    ) -> Written:
        """One request each; the seed is its own."""
        left = [(place, text) for place, text in enumerate(requests) if place not in done]

        def ask() -> list[tuple[int, str, bool]]:
            found, failures = [], []
            for at, answer in self._route.each(lambda item: self._answer(item[1]), left):
                place = left[at][0]
                if isinstance(answer, Said):
                    keep({place: answer})
                    found.append((place, *answer))
                else:
                    failures.append(answer)
                bar.advance()
                if world().size == 1:  # rank 0 cannot ask the others here
                    stop_if_asked(KEPT)
            tell_failures("reviser: no answer", failures, len(left))
            return found

        made = {place: Said(text, ended) for place, text, ended in by_main(ask)}
        return {**done, **made}

    def _answer(self, text: str) -> Said | str:
        """What it writes, or why it will not.

        Raises:
            ServerFault: the server is not there, or too busy for as long as it is asked.
        """
        try:
            choice = self._route.choice(self._route.ask(text, **self._options))
            ended = choice.get("finish_reason") not in CUT
            return Said(choice["message"].get("content") or "", ended)
        except ServerFault as fault:
            if fault.status is None or fault.status in BUSY:
                raise
            return str(fault)


def reviser_of(cfg: GenerateConfig, policy: Policy, load: Callable[[str], Policy]) -> Reviser:
    """The model that the config names; the policy itself where it names none."""
    if cfg.reviser is not None and is_address(cfg.reviser):
        return EndpointReviser(cfg)
    return LocalReviser(policy if cfg.reviser is None else load(cfg.reviser), cfg)
