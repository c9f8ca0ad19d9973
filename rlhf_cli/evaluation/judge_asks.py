"""A language model that says which of two responses is better: a local policy, or an endpoint.

Either gives the log-odds that the first one shown is; what they are made of is told to the other
file, pair_judge.py, which asks in both orders. What was answered once is not asked again.
"""

import json
import math
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.judge_rules import is_address
from rlhf_cli.config.schema.stages import LabelConfig
from rlhf_cli.data.dataset import cache_folder
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.templates import CHAT, PLAIN
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evaluation.chat_route import ChatRoute, tell_failures
from rlhf_cli.evaluation.judge_questions import Ask, Questions
from rlhf_cli.evaluation.judgements import TOKENS, Spending, Verdicts, name_of
from rlhf_cli.evaluation.kept import stop_if_asked
from rlhf_cli.folders.manifest import content_hash, file_hash, text_hash
from rlhf_cli.models.positions import positions_of
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import Bar
from rlhf_cli.rollout.server_client import ServerFault, Unreachable
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.out_files import CHECKPOINTS
from rlhf_cli.runs.policy import Policy

KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")
"""The variables that the key of an endpoint may stand in; the first that is set."""

KEPT = "verdicts so far are kept"
PAID = "judge.jsonl"  # what a run has asked in all its starts
AT_ONCE = 256  # questions to a local judge, after which their answers are kept
SURE = 8.0  # log-odds, at most: what a verdict in words counts as
TOP = 20  # tokens whose log-probs are asked for
VERDICT = re.compile(r"\[\[([ABC])\]\]")
LETTER = re.compile(r"\W*([ABC])\W*")


class Unasked(RunError):
    """What is left cannot be asked: all that a judge may cost is paid, or it is not there."""


def paid_file(cfg: Any) -> Path:
    """Where a run writes its calls down: with its resume points, which go at the end; but beside
    labels, which a review opens and seals once more.
    """
    folder = Path(cfg.out) if isinstance(cfg, LabelConfig) else Path(cfg.out, CHECKPOINTS)
    return folder / PAID


class PairJudge(Protocol):
    """Says which of two is better."""

    @property
    def counts(self) -> Counter[str]:
        """calls, cached, prompt_tokens, completion_tokens."""

    def log_odds(self, asks: Sequence[Ask]) -> list[float | None]:
        """That the first is better, for each; None where the judge failed."""


class KeptJudge(ABC):
    """A judge whose answers are kept for other runs; a subclass asks."""

    def __init__(self, cfg: Any, named: str) -> None:
        """Of a run, with all that was asked before.

        Args:
            cfg: of a stage that has `JudgeKeys`.
            named: all that its answer to a question depends on.
        """
        out = Path(cfg.out)
        self.questions = Questions.of(cfg)
        self._verdicts = Verdicts(
            cache_folder(cfg.data) / "judgements" / f"{text_hash(named)}.jsonl"
        )
        self._spending = Spending(
            paid_file(cfg), cfg.judge_prices, cfg.judge_max_cost, lambda: check_lock(out)
        )

    @property
    def counts(self) -> Counter[str]:
        """Of all starts of the run: calls, cached, prompt_tokens, completion_tokens."""
        return self._spending.counts

    def log_odds(self, asks: Sequence[Ask]) -> list[float | None]:
        """Each is asked unless its answer is kept.

        Raises:
            Unasked: what is left may not be paid, or the judge is not there.
        """
        texts = [self.questions.written(ask) for ask in asks]
        names = [name_of(text) for text in texts]
        known = by_main(lambda: self._verdicts.of(names))
        self._spending.count_cached(name for name in names if name in known)
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in known}
        known |= self._answers(new)
        return [known.get(name) for name in names]

    @abstractmethod
    def _answers(self, new: Mapping[str, str]) -> dict[str, float]:
        """The log-odds of questions by name, kept and paid; without those that failed."""


class LocalJudge(KeptJudge):
    """A policy in this process: the log-odds of " A" against " B" as its next words."""

    def __init__(self, policy: Policy, cfg: Any) -> None:
        read_by = f"{cfg.data.special_tokens} {json.dumps(cfg.data.chat_args, sort_keys=True)}"
        super().__init__(cfg, f"{content_hash(cfg.judge)} {cfg.model.dtype} {read_by}")
        data = replace(
            cfg.data,
            template=CHAT if policy.tokenizer.chat_template else PLAIN,
            chat_template=None,
            max_prompt_tokens=None,
            long_prompts="error",
        )
        self._encoder = Encoder(policy.tokenizer, data, positions_of(policy.model), room=1)
        self._policy, self._cfg = policy, cfg

    def _answers(self, new: Mapping[str, str]) -> dict[str, float]:
        """Both answers are scored, neither is sampled.

        Raises:
            UserError: a question is too long for the judge.
        """
        try:
            self._encoder.prompts([Prompt(text) for text in new.values()])
        except UserError as error:
            fault = str(error).lstrip(": ").partition(";")[0]
            raise UserError(
                f"judge={self._cfg.judge} cannot read a question: {fault}; give a shorter "
                "judge_prompt, or a judge that reads more"
            ) from None
        names = list(new)
        found: dict[str, float] = {}
        with Bar("judge", len(names)) as bar:
            for first in range(0, len(names), AT_ONCE):
                block = names[first : first + AT_ONCE]
                found |= self._scored({name: new[name] for name in block})
                bar.advance(len(block))
                stop_if_asked(KEPT)
        return found

    def _scored(self, block: Mapping[str, str]) -> dict[str, float]:
        rows = [Prompt(text) for text in block.values() for _ in "AB"]
        tokens = self._encoder.written(rows, ["A", "B"] * len(block), [False] * len(rows))
        sums = [
            each.double().sum().item()
            for each in logprobs_of(self._policy.model, tokens, self._cfg.hardware)
        ]
        odds = [clipped(sums[i] - sums[i + 1]) for i in range(0, len(sums), 2)]
        found = dict(zip(block, odds, strict=True))
        read = {name: (len(tokens[2 * i].prompt), 0) for i, name in enumerate(block)}

        def keep() -> None:
            self._spending.add(read)
            self._verdicts.keep(found)

        by_main(keep)
        return found


class Endpoint(KeptJudge):
    """A server with the chat route of OpenAI's API; rank 0 alone asks."""

    def __init__(self, cfg: Any) -> None:
        assert cfg.judge is not None and cfg.judge_model is not None
        super().__init__(cfg, f"{cfg.judge} {cfg.judge_model} {cfg.judge_tokens}")
        self._route = ChatRoute(
            *(cfg.judge, cfg.judge_model),
            keys=KEYS,
            timeout=cfg.judge_timeout,
            limited_by="judge_timeout",
            at_once=cfg.judge_concurrency,
        )
        self._tokens = cfg.judge_tokens

    def _answers(self, new: Mapping[str, str]) -> dict[str, float]:
        return by_main(lambda: self._asked(new))

    def _asked(self, new: Mapping[str, str]) -> dict[str, float]:
        found: dict[str, float] = {}
        failures: list[str] = []
        unasked, items = 0, list(new.items())
        with Bar("judge", len(items)) as bar:
            for place, answer in self._route.each(self._answer, items):
                if answer is None:
                    unasked += 1
                elif isinstance(answer, str):
                    failures.append(answer)
                else:
                    found[items[place][0]] = answer
                    self._verdicts.keep({items[place][0]: answer})
                bar.advance()
                if world().size == 1:  # rank 0 cannot ask the others here
                    stop_if_asked(KEPT)
        tell_failures("judge: no verdict", failures, len(new))
        if unasked:
            raise Unasked(
                f"judge_max_cost={self._spending.most:g} is spent after {self.counts['calls']} "
                f"calls, and {unasked} are left; verdicts so far are kept: the same command with a "
                "greater judge_max_cost goes on"
            )
        return found

    def _answer(self, item: tuple[str, str]) -> float | str | None:
        """Log-odds, or what went wrong, which is never taken for a tie; None unasked, where all is
        spent.

        Raises:
            RunError: the endpoint does not tell what a call costs, and that is limited.
            Unasked: it is not there; each call that is left would wait as long.
        """
        name, text = item
        if self._spending.is_spent:
            return None
        asked = {"logprobs": True, "top_logprobs": TOP} if self._tokens == 1 else {}
        try:
            answer = self._route.ask(text, temperature=0, max_tokens=self._tokens, **asked)
            usage = self._route.usage(answer)
            self._spending.add({name: [usage.get(each) or 0 for each in TOKENS]})
            choice = self._route.choice(answer)
            if self._spending.most is not None and not usage:
                raise RunError(
                    f"{self._route.url} tells no usage, so judge_max_cost="
                    f"{self._spending.most:g} cannot be held; set it to null"
                )
            return verdict_of(choice)
        except Unreachable as fault:
            raise Unasked(f"{fault}; {KEPT}: the same command goes on") from None
        except ServerFault as fault:
            return str(fault)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            return f"{self._route.url} answered otherwise than asked: {error or type(error)}"


def verdict_of(choice: Any) -> float:
    """The log-odds of A in the answer of an endpoint.

    From the log-probs of its first token, where it gives them; else from what it says: the last
    [[A]], [[B]] or [[C]] (a tie), or one of these letters alone.

    Raises:
        ValueError: it says none of them.
    """
    content = (choice.get("logprobs") or {}).get("content") or []
    if content and (found := odds_of_tokens(content[0].get("top_logprobs") or [])) is not None:
        return found
    text = choice["message"].get("content") or ""
    letters = VERDICT.findall(text) or LETTER.fullmatch(text.strip())
    if not letters:
        raise ValueError(f"no verdict in {text[:80]!r}")
    letter = letters[-1] if isinstance(letters, list) else letters[1]
    return {"A": SURE, "B": -SURE, "C": 0.0}[letter]


def odds_of_tokens(tokens: Sequence[dict[str, Any]]) -> float | None:
    """log P(A) / P(B) over spellings of both; None where neither is among the likeliest.

    One that is not among them counts as the least likely of those.
    """
    mass = {"A": 0.0, "B": 0.0}
    chances = [math.exp(min(each["logprob"], 0.0)) for each in tokens]
    for each, chance in zip(tokens, chances, strict=True):
        if math.isnan(chance):
            raise ValueError("a log-prob is no number")
        if (letter := str(each["token"]).strip()) in mass:
            mass[letter] += chance
    if not any(mass.values()):
        return None
    least = max(min(chances), sys.float_info.min)  # -9999 stands for 0
    ours, theirs = (each or min(least, max(mass.values())) for each in mass.values())
    return clipped(math.log(ours) - math.log(theirs))


def clipped(log_odds: float) -> float:
    """Within what a verdict in words counts as."""
    return max(-SURE, min(SURE, log_odds))


def identity_of(cfg: Any) -> dict[str, str | None]:
    """Which judge it is, by which question and principles, for the report."""
    assert cfg.judge is not None
    return {
        "judge": cfg.judge,
        "model": cfg.judge_model if is_address(cfg.judge) else content_hash(cfg.judge),
        "prompt": text_hash(Questions.of(cfg).template),
        "principles": None if cfg.principles is None else file_hash(Path(cfg.principles)),
    }


Loader = Callable[[str], Policy]


def judge_of(cfg: Any, load: Loader) -> KeptJudge:
    """The judge that the config of a stage with `JudgeKeys` names."""
    assert cfg.judge is not None
    return Endpoint(cfg) if is_address(cfg.judge) else LocalJudge(load(cfg.judge), cfg)
