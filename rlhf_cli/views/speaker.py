"""A policy that answers in a dialogue, written by the template of its training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_cli.config.schema.stages import GenerateConfig
from rlhf_cli.data.items import EncodedPrompt
from rlhf_cli.data.kinds import Prompt, Turns
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.templates import CHAT, PLAIN, TextTemplate
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.positions import positions_of
from rlhf_cli.models.tokenizers import ids_of_no_token, load_tokenizer, stop_ids_of
from rlhf_cli.rewards.reward import Reward, load_reward
from rlhf_cli.rollout.decode import Completion, decode
from rlhf_cli.rollout.rollouts import Rollout, as_rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.device import device_of, set_threads
from rlhf_cli.views.chat import Exchange
from rlhf_cli.views.chat_screen import Answer

INTERRUPTED = "interrupted"  # how a response ends that its reader does not want to the end


@dataclass
class Known:
    """A dialogue as a policy reads it, without the first `left_out` exchanges."""

    prompt: EncodedPrompt
    left_out: int


class Speaker:
    """A policy with its encoder, and what scores its answers.

    name: as it was named on the command line.
    """

    def __init__(self, name: str, cfg: GenerateConfig, reward: "Scorer | None" = None) -> None:
        """
        Args:
            cfg: of `generate` from this policy, with what it inherits filled in.
            reward: of another policy, which is taken over where both read the same tokens.
        """
        self.name, self._cfg = name, cfg
        device = device_of(cfg.hardware.device)
        tokenizer = load_tokenizer(cfg.policy, cfg.model)
        self._model = load_policy(cfg.policy, cfg.model, tokenizer, device)
        set_threads(cfg.hardware.threads, sum(each.numel() for each in self._model.parameters()))
        template = cfg.data.template
        chats = cfg.data.chat_template is not None or tokenizer.chat_template is not None
        self._template: TextTemplate | None = None
        if template != CHAT and (template is not None or not chats):
            self._template = TextTemplate(template or PLAIN)
        written = CHAT if self._template is None else PLAIN
        data = replace(cfg.data, template=written, long_prompts="drop")
        context, room = positions_of(self._model), cfg.algo.sampled_tokens
        self._encoder = Encoder(tokenizer, data, context, room)
        self._encoder.ends_with(stop_ids_of(cfg.policy, tokenizer))
        absent = ids_of_no_token(self._model, tokenizer)
        self._sampling = replace(Sampling.of(cfg.algo), absent=absent)
        self._drawn = 0
        self.reward: Scorer | None = None
        if cfg.reward is not None:
            known = reward is not None and reward.vocabulary == tokenizer.get_vocab()
            self.reward = reward if known else Scorer(cfg, tokenizer, device)

    @property
    def how(self) -> str:
        """How prompts are written, and how long they may be, in words."""
        written = "its chat template" if self._template is None else repr(self._template.text)
        limit = self._encoder.limits.prompt
        most = "" if limit is None else f", up to {limit} tokens"
        return f"{self.name}: prompts by {written}{most}, answers of {self.longest} tokens at most"

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return self._sampling.max_tokens

    def reads(
        self, system: str, told: Sequence[Exchange], place: int, message: str
    ) -> Known | None:
        """A dialogue with a new message; None where that is too long by itself.

        Args:
            told: what was said before.
            place: of this policy among those that answered.
        """
        for left_out in range(len(told) + 1):
            pairs = [(each.message, each.answers[place].text) for each in told[left_out:]]
            found = self._encoder.prompts([self._row(system, pairs, message)])
            if found:
                return Known(found[0], left_out)
        return None

    def _row(self, system: str, pairs: Sequence[tuple[str, str]], message: str) -> Prompt:
        if self._template is None:
            turns: Turns = [{"role": "system", "content": system}] if system else []
            for asked, answer in pairs:
                turns.append({"role": "user", "content": asked})
                turns.append({"role": "assistant", "content": answer})
            return Prompt([*turns, {"role": "user", "content": message}])
        shows = "system" in self._template.names
        columns: dict[str, Any] = {"system": system} if shows else {}
        text = f"{system}\n" if system and not shows else ""
        for asked, answer in pairs:
            text += f"{self._template.fill(asked, columns, 'chat')}{answer}\n"
        return Prompt(text + self._template.fill(message, columns, "chat"))

    def answers(self, known: Known, temperature: float, heard: Callable[[str], None]) -> Answer:
        """A new answer, and its score; another one each time.

        Args:
            heard: is told the text so far. An interrupt by the keyboard ends the answer there.
        """
        row, ids = known.prompt
        sampling = replace(self._sampling, temperature=temperature)
        self._drawn += 1
        draw = torch.Generator().manual_seed(derived_seed(self._cfg.seed, "chat", self._drawn))
        noise = torch.rand((1, sampling.max_tokens), generator=draw)
        made: list[int] = []

        def hear(so_far: list[int]) -> None:
            made[:] = so_far
            heard(settled(self._encoder.text(so_far), sampling.stop))

        stop_ids, text_of = self._encoder.stop_ids, self._encoder.text
        try:
            (found,) = decode(self._model, [ids], noise, sampling, stop_ids, text_of, hear)
        except KeyboardInterrupt:
            found = Completion(made, [0.0] * len(made), INTERRUPTED)
        rollout = as_rollout(row, ids, found, self._encoder, sampling)
        score = None if self.reward is None or not made else self.reward.of(rollout)
        return Answer(rollout.text, found.finish_reason, score)


def settled(text: str, stops: Sequence[str]) -> str:
    """An unfinished answer without what may still go: half of a character, what ends it."""
    text = text.rstrip("\ufffd")
    for stop in stops:
        text = text[: text.index(stop)] if stop in text else text
        begun = range(len(stop) - 1, 0, -1)
        text = text[: -next((n for n in begun if text.endswith(stop[:n])), 0) or None]
    return text


class Scorer:
    """What `reward=` says of answers, for policies of one vocabulary."""

    def __init__(self, cfg: GenerateConfig, tokenizer: Any, device: torch.device) -> None:
        assert cfg.reward is not None
        self.vocabulary = tokenizer.get_vocab()
        self._reward: Reward = load_reward(cfg.reward, cfg, tokenizer, device)
        for term in self._reward.terms:  # what reads columns of rows has none to read
            term.source.check([Prompt("Hello", source="chat")], lambda *check: None, "reward")

    def of(self, rollout: Rollout) -> float | None:
        """Of an answer; None where nothing applies."""
        score = self._reward.score([rollout]).total.item()
        return score if math.isfinite(score) else None
