"""The responses that the data has to the prompts of an evaluation, as people wrote them."""

from collections.abc import Sequence

import torch

from rlhf_cli.data.held_out import identity
from rlhf_cli.data.items import EncodedPrompt
from rlhf_cli.data.kinds import Demonstration, Prompt, Reply, reply_text
from rlhf_cli.data.rows import Rows
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evaluation.contest import REFERENCES
from rlhf_cli.evaluation.figures import Sampled
from rlhf_cli.evaluation.kept import KeptSamples
from rlhf_cli.rewards.reward import Reward, Scores
from rlhf_cli.rollout.rollouts import Rollout


def references_of(prompts: Sequence[EncodedPrompt], rows: Rows) -> list[str | None]:
    """The response that the data has to each prompt, or None.

    It is what the row itself says: its completion, the chosen side of a pair, the first of the best
    of a ranking; never one that has a thumb down. The demo's demonstrations stand in a file of
    their own.
    """
    apart: dict[str, str] = {}
    if rows.data.format == "demo":
        demonstrations = rows.held_out(Demonstration).held_out
        apart = {identity(row): reply_text(row.completion) for row in reversed(demonstrations)}
    return [own_reference(row) or apart.get(identity(row)) for row, _ in prompts]


def own_reference(row: Prompt) -> str | None:
    """What a row that a prompt is derived from says of a good response."""
    said = row.beside
    reply: Reply | None = said.get("chosen")
    if reply is None and said.get("label") is not False:
        reply = said.get("completion")
    if reply is None and "ranks" in said:
        reply = said["responses"][said["ranks"].index(min(said["ranks"]))]
    return reply_text(reply) if reply is not None else None


def scored_references(
    texts: Sequence[str | None],
    prompts: Sequence[EncodedPrompt],
    encoder: Encoder,
    judges: dict[str, Reward],
    kept: KeptSamples,
) -> Sampled | None:
    """The references as if a policy had written them, and what each judge says; None without any.

    Where there is none, no judge has said anything.
    """
    places = [place for place, text in enumerate(texts) if text is not None]
    if not places:
        return None
    rows = [prompts[place][0] for place in places]
    written = [text for text in texts if text is not None]
    tokens = encoder.written(rows, written, [True] * len(rows))
    rollouts = [
        Rollout(row, sequence, [], "eos", text)
        for row, sequence, text in zip(rows, tokens, written, strict=True)
    ]
    own = kept.of(REFERENCES, [], 1)
    said = {name: own.scored(name, judge, rollouts) for name, judge in judges.items()}
    return Sampled(
        rollouts, {name: spread(scores, places, len(texts)) for name, scores in said.items()}, 1
    )


def spread(scores: Scores, places: Sequence[int], count: int) -> Scores:
    """The scores at their places among all prompts, NaN elsewhere."""
    total = torch.full((count,), torch.nan)
    total[list(places)] = scores.total
    return Scores(total, {}, scores.seconds)
