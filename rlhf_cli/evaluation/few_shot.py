"""A policy that is shown demonstrations before each prompt: InstructGPT's prompted GPT-3.

What it responds is judged as if it had been asked the prompt alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.items import EncodedPrompt
from rlhf_cli.data.kinds import Demonstration, Prompt, reply_text
from rlhf_cli.data.reading import Walk
from rlhf_cli.data.rows import Rows, walked
from rlhf_cli.data.sources import Source
from rlhf_cli.data.templates import PLAIN, message_of, turns_of
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.positions import positions_of
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.policy import Policy

BETWEEN = ("\n\n", "\n\n###\n\n")
"""What may stand between demonstrations as text, and end a response: the first that none has."""

READ = 1000  # training rows among which the first demonstrations are


@dataclass
class Shots:
    """Demonstrations, in the order in which they are shown."""

    rows: list[Demonstration]

    @classmethod
    def of(cls, few_shot: str, rows: Rows) -> "Shots":
        """Those of a file, or the first so many of the training rows.

        Raises:
            UserError: there are none, or fewer.
        """
        if not few_shot.isdecimal():
            shape = "rows" if rows.data.format == "demo" else rows.data.format
            source = Source(few_shot, shape, rows.data.columns)
            return cls(walked(Walk(source, Demonstration, rows.data))[0])
        count = int(few_shot)
        train = rows.split(Demonstration, max(READ, count)).train
        if not 0 < count <= len(train):
            raise UserError(
                f"few_shot={few_shot}: data has {len(train)} demonstrations to learn from"
            )
        return cls(train[:count])

    def asker(self, policy: Policy, cfg: Any) -> Policy:
        """The same model, with an encoder of prompts that hold demonstrations, however long."""
        chat = self._in_turns(policy.encoder, self.rows)
        data = replace(
            policy.encoder.data,
            template=policy.encoder.data.template if chat else PLAIN,
            max_prompt_tokens=None,
            long_prompts="error",
        )
        encoder = Encoder(
            policy.tokenizer, data, positions_of(policy.model), cfg.algo.sampled_tokens
        )
        encoder.ends_with(policy.stop_ids)
        return Policy.of(policy.model, encoder, cfg.hardware)

    def asked(self, rows: Sequence[Prompt], encoder: Encoder) -> tuple[list[Prompt], str | None]:
        """The prompts with all demonstrations before them, and the text that ends a response.

        A dialogue has them as turns after its system message; its template ends a response.
        """
        if self._in_turns(encoder, [*self.rows, *rows]):
            shown = [
                turn
                for row in self.rows
                for turn in [*turns_of(row.prompt, {}), message_of(row.completion)]
            ]
            prompts = []
            for row in rows:
                turns = turns_of(row.prompt, row.columns)
                system = [turn for turn in turns[:1] if turn["role"] == "system"]
                asked = [*system, *shown, *turns[len(system) :]]
                prompts.append(replace(row, prompt=asked))
            return prompts, None
        examples = [
            encoder.shown(row).prompt + reply_text(row.completion).rstrip() for row in self.rows
        ]
        between = next((each for each in BETWEEN if each not in "".join(examples)), None)
        if between is None:
            raise UserError(f"few_shot: demonstrations hold both of {BETWEEN}, which stand between")
        before = between.join([*examples, ""])
        return [replace(row, prompt=before + encoder.shown(row).prompt) for row in rows], between

    @staticmethod
    def _in_turns(encoder: Encoder, rows: Sequence[Any]) -> bool:
        return any(encoder.shown(row).chat for row in rows)


def as_asked_alone(
    rollouts: Sequence[Rollout], prompts: Sequence[EncodedPrompt], samples: int, encoder: Encoder
) -> list[Rollout]:
    """Responses as if to the prompts without demonstrations."""
    rows = [row for row, _ in prompts for _ in range(samples)]
    texts = [rollout.text for rollout in rollouts]
    tokens = encoder.written(rows, texts, [rollout.ended for rollout in rollouts])
    return [
        replace(rollout, row=row, tokens=sequence)
        for rollout, row, sequence in zip(rollouts, rows, tokens, strict=True)
    ]
