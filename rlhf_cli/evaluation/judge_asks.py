"""A language model that says which of two responses is better: a local policy, or an endpoint.

Either gives the log-odds that the first one shown is; what they are made of is told to the other
file, pair_judge.py, which asks in both orders.
"""

import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rlhf_cli.config.errors import Interrupted, RunError, UserError
from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.data.dataset import cache_folder
from rlhf_cli.data.held_out import hash_of
from rlhf_cli.data.kinds import Prompt, reply_text
from rlhf_cli.data.templates import CHAT, PLAIN
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.journal import Journal
from rlhf_cli.folders.manifest import content_hash, text_hash
from rlhf_cli.models.positions import positions_of
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.rollout.server_client import Client, ServerFault
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.policy import Policy

KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")
"""The variables that the key of an endpoint may stand in; the first that is set."""

SURE = 8.0  # log-odds, at most: what a verdict in words counts as
TOP = 20  # tokens whose log-probs are asked for
TOLD = 3  # failures that are told one by one
VERDICT = re.compile(r"\[\[([ABC])\]\]")
LETTER = re.compile(r"\W*([ABC])\W*")

TEMPLATE = """Which of two responses to a prompt is better? Judge how helpful, correct and fitting \
they are. Neither their order nor their length shall sway you.

Prompt:
{prompt}

Response A:
{first}

Response B:
{second}

Answer with one letter, A or B.
Answer: """
"""The question, where judge_prompt names no other."""


@dataclass(frozen=True)
class Ask:
    """Two responses to a prompt, in the order in which they are shown."""

    prompt: str
    first: str
    second: str

    def written(self, template: str) -> str:
        """The question as a judge reads it; what responses say of braces is theirs."""
        parts = {"{prompt}": self.prompt, "{first}": self.first, "{second}": self.second}
        return re.sub(r"\{(?:prompt|first|second)\}", lambda match: parts[match[0]], template)


class PairJudge(Protocol):
    """Says which of two is better.

    counts: calls, cached, prompt_tokens, completion_tokens.
    """

    counts: Counter[str]

    def log_odds(self, asks: Sequence[Ask]) -> list[float | None]:
        """That the first is better, for each; None where the judge failed."""


def template_of(cfg: EvaluateConfig) -> str:
    """The question that a judge is asked.

    Raises:
        UserError: it lacks a part.
    """
    if cfg.judge_prompt is None:
        return TEMPLATE
    try:
        text = Path(cfg.judge_prompt).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"judge_prompt={cfg.judge_prompt} cannot be read: {error}") from None
    if missing := [each for each in ("{prompt}", "{first}", "{second}") if each not in text]:
        raise UserError(f"judge_prompt={cfg.judge_prompt} lacks {missing[0]}")
    return text


def is_address(judge: str) -> bool:
    """Whether a judge is an endpoint, not a folder or hub id."""
    return judge.startswith(("http://", "https://"))


def asked_text(prompt: Any) -> str:
    """A prompt for a judge to read; a dialogue turn by turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {reply_text(turn)}" for turn in prompt)


class LocalJudge:
    """A policy in this process: the log-odds of " A" against " B" as its next words."""

    def __init__(self, policy: Policy, cfg: EvaluateConfig) -> None:
        data = replace(
            cfg.data,
            template=CHAT if policy.tokenizer.chat_template else PLAIN,
            chat_template=None,
            max_prompt_tokens=None,
            long_prompts="error",
        )
        self._encoder = Encoder(policy.tokenizer, data, positions_of(policy.model), room=1)
        self._policy, self._cfg = policy, cfg
        self._template = template_of(cfg)
        self.counts: Counter[str] = Counter()

    def log_odds(self, asks: Sequence[Ask]) -> list[float | None]:
        """Both answers are scored, neither is sampled.

        Raises:
            UserError: a question is too long for the judge.
        """
        rows = [Prompt(ask.written(self._template)) for ask in asks for _ in "AB"]
        try:
            self._encoder.prompts(rows[::2])
        except UserError as error:
            fault = str(error).lstrip(": ").partition(";")[0]
            raise UserError(
                f"judge={self._cfg.judge} cannot read a question: {fault}; give a shorter "
                "judge_prompt, or a judge that reads more"
            ) from None
        tokens = self._encoder.written(rows, ["A", "B"] * len(asks), [False] * len(rows))
        sums = [
            each.double().sum().item()
            for each in logprobs_of(self._policy.model, tokens, self._cfg.hardware)
        ]
        self.counts["calls"] += len(asks)
        self.counts["prompt_tokens"] += sum(len(each.prompt) for each in tokens[::2])
        return [clipped(sums[i] - sums[i + 1]) for i in range(0, len(sums), 2)]


class Endpoint:
    """A server with the chat route of OpenAI's API, whose answers are kept for other runs."""

    def __init__(self, cfg: EvaluateConfig) -> None:
        assert cfg.judge is not None and cfg.judge_model is not None
        key = next((name for name in KEYS if os.environ.get(name)), KEYS[0])
        self._client = Client(
            cfg.judge.rstrip("/"),
            cfg.judge_timeout,
            key_of=key,
            limited_by="judge_timeout",
            at_once=cfg.judge_concurrency,
        )
        self._template = template_of(cfg)
        self._model, self._tokens = cfg.judge_model, cfg.judge_tokens
        self._prices, self._most = cfg.judge_prices, cfg.judge_max_cost
        self.counts: Counter[str] = Counter()
        self._guard = threading.Lock()
        named = text_hash(f"{cfg.judge} {cfg.judge_model} {cfg.judge_tokens}")
        self._file = cache_folder(cfg.data) / "judgements" / f"{named}.jsonl"

    def log_odds(self, asks: Sequence[Ask]) -> list[float | None]:
        """Each is asked unless its answer is kept; rank 0 alone asks."""
        return by_main(lambda: self._log_odds(asks))

    def _log_odds(self, asks: Sequence[Ask]) -> list[float | None]:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(self._file)
        known = {each["ask"]: each["log_odds"] for block in journal.blocks() for each in block}
        texts = [ask.written(self._template) for ask in asks]
        names = [f"{hash_of(text):016x}" for text in texts]
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in known}
        self.counts["cached"] += len(names) - sum(name in new for name in names)
        failures: list[str] = []
        unasked = 0
        with Bar("judge", len(new)) as bar:
            items = list(new.items())
            for place, answer in self._client.each(lambda item: self._answer(item[1]), items):
                if answer is None:
                    unasked += 1
                elif isinstance(answer, str):
                    failures.append(answer)
                else:
                    name = items[place][0]
                    known[name] = answer
                    journal.append([{"ask": name, "log_odds": answer}])
                bar.advance()
                if world().size == 1 and (signal := interrupts.asked()) is not None:
                    raise Interrupted(
                        f"{signal}: verdicts so far are kept; the same command goes on"
                    )
        for line in failures[:TOLD]:
            say(f"judge: no verdict: {line}")
        if len(failures) > TOLD:
            say(f"judge: no verdict in {len(failures) - TOLD} more of {len(new)} calls")
        if unasked:
            raise RunError(
                f"judge_max_cost={self._most:g} is spent after {self.counts['calls']} calls, and "
                f"{unasked} are left; verdicts so far are kept: the same command goes on, for as "
                "much again"
            )
        return [known.get(name) for name in names]

    def _is_spent(self) -> bool:
        with self._guard:
            return self._most is not None and price_of(self.counts, self._prices) >= self._most

    def _answer(self, text: str) -> float | str | None:
        """Log-odds, or what went wrong, which is never taken for a tie; None unasked, where all is
        spent.

        Raises:
            RunError: the endpoint does not tell what a call costs, and that is limited.
        """
        if self._is_spent():
            return None
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self._tokens,
            **({"logprobs": True, "top_logprobs": TOP} if self._tokens == 1 else {}),
        }
        try:
            answer = self._client.post("/chat/completions", body)
            with self._guard:
                self.counts["calls"] += 1
                usage = answer.get("usage") or {}
                if self._most is not None and not usage:
                    raise RunError(
                        f"{self._client.url} tells no usage, so judge_max_cost={self._most:g} "
                        "cannot be held; set it to null"
                    )
                for name in ("prompt_tokens", "completion_tokens"):
                    self.counts[name] += int(usage.get(name) or 0)
            return verdict_of(answer["choices"][0])
        except ServerFault as fault:
            return str(fault)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            return f"{self._client.url} answered otherwise than asked: {error or type(error)}"


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
    text = choice["message"]["content"] or ""
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
    for each in tokens:
        if (letter := str(each["token"]).strip()) in mass:
            mass[letter] += math.exp(each["logprob"])
    if not any(mass.values()):
        return None
    least = math.exp(min(each["logprob"] for each in tokens))
    ours, theirs = (each or min(least, max(mass.values())) for each in mass.values())
    return clipped(math.log(ours) - math.log(theirs))


def price_of(counts: Mapping[str, int], prices: Sequence[float]) -> float:
    """What was read and written costs, at prices of a million tokens of each."""
    read, written = (counts.get(name, 0) for name in ("prompt_tokens", "completion_tokens"))
    return (read * prices[0] + written * prices[1]) / 1e6


def clipped(log_odds: float) -> float:
    """Within what a verdict in words counts as."""
    return max(-SURE, min(SURE, log_odds))


def identity_of(cfg: EvaluateConfig) -> dict[str, str | None]:
    """Which judge it is, and by which question, for the report."""
    assert cfg.judge is not None
    return {
        "judge": cfg.judge,
        "model": cfg.judge_model if is_address(cfg.judge) else content_hash(cfg.judge),
        "prompt": text_hash(template_of(cfg)),
    }


Loader = Callable[[str], Policy]


def judge_of(cfg: EvaluateConfig, load: Loader) -> PairJudge:
    """The judge that the config names."""
    assert cfg.judge is not None
    return Endpoint(cfg) if is_address(cfg.judge) else LocalJudge(load(cfg.judge), cfg)
