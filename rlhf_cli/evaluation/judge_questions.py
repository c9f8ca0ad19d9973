"""What a judge is asked: which of two responses is better, or better by a principle."""

import re
from dataclasses import dataclass
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import reply_text
from rlhf_cli.evaluation.principles import drawn, read_principles, template_of

PARTS = ("{prompt}", "{first}", "{second}")
PRINCIPLE = "{principle}"
CRITERIA = "Judge how helpful, correct and fitting they are."

TEMPLATE = f"""Which of two responses to a prompt is better? {CRITERIA} Neither their order nor \
their length shall sway you.

Prompt:
{{prompt}}

Response A:
{{first}}

Response B:
{{second}}

Answer with one letter, A or B.
Answer: """
"""The question, where judge_prompt names no other."""

BY_PRINCIPLE = TEMPLATE.replace(CRITERIA, f"Judge by this principle: {PRINCIPLE}")
"""The same with principles."""


@dataclass(frozen=True)
class Ask:
    """Two responses to a prompt, in the order in which they are shown."""

    prompt: str
    first: str
    second: str

    def written(self, template: str, principle: str | None = None) -> str:
        """The question as a judge reads it; what responses say of braces is theirs."""
        parts = {"{prompt}": self.prompt, "{first}": self.first, "{second}": self.second}
        return filled_in(template, parts | ({} if principle is None else {PRINCIPLE: principle}))


def filled_in(template: str, parts: dict[str, str]) -> str:
    """A template with each part in its place; braces within parts stay as they are."""
    places = "|".join(map(re.escape, parts))
    return re.sub(places, lambda match: parts[match[0]], template)


@dataclass(frozen=True)
class Questions:
    """How a judge is asked: by one template, and by one of the principles if there are any."""

    template: str
    principles: tuple[str, ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, cfg: Any) -> "Questions":
        """Those of a stage that has `JudgeKeys`.

        Raises:
            UserError: a file cannot be read, the question lacks a part, or has one too many.
        """
        principles = tuple(read_principles(cfg.principles))
        ours, parts = (BY_PRINCIPLE, (*PARTS, PRINCIPLE)) if principles else (TEMPLATE, PARTS)
        template = template_of("judge_prompt", cfg.judge_prompt, ours, parts)
        if not principles and PRINCIPLE in template:
            raise UserError(f"judge_prompt={cfg.judge_prompt} has {PRINCIPLE}: give principles=")
        return cls(template, principles, cfg.seed)

    def principle(self, ask: Ask) -> str | None:
        """The one that a pair is judged by, drawn from its texts: in either order the same."""
        if not self.principles:
            return None
        sides = sorted((ask.first, ask.second))
        return drawn(self.principles, self.seed, ask.prompt, *sides)

    def written(self, ask: Ask) -> str:
        """A question."""
        return ask.written(self.template, self.principle(ask))


def asked_text(prompt: Any) -> str:
    """A prompt for a judge to read; a dialogue turn by turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {reply_text(turn)}" for turn in prompt)
