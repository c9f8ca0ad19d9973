"""Responses that were compared or scored."""

import re

from rlhf_cli.data.columns import PAIR, column, is_given, shown
from rlhf_cli.data.labels import as_number
from rlhf_cli.data.messages import text_of
from rlhf_cli.data.raw import Raw, RowError
from rlhf_cli.data.shapes.shape import given, inner, object_of, objects_of, reads

HELPSTEER_TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
HELPSTEER_PAIRS = {
    "overall_preference": ("response1", "response2"),
    "preference_strength": ("response_1", "response_2"),
}


@reads(
    *("instruction", "completions", "prompt", *PAIR),
    *("score_chosen", "score_rejected", "messages"),  # these are the chosen side again
)
def ultrafeedback(raw: Raw, source: str) -> Raw:
    """OpenBMB's four answers to an instruction, or the pairs that others made of them.

    Answers go by fine-grained_score, their mean over aspects: overall_score is 10 where 1 was meant
    in some published rows.
    """
    if not is_given(raw, "completions"):
        ours = {name: column(raw, name, source) for name in ("chosen", "rejected")}
        better, worse = (as_number(raw.get(f"score_{side}")) for side in ours)
        if better is not None and worse is not None:
            if better < worse:
                raise RowError(
                    f"{source}: column 'score_chosen' holds {better:g}, less than 'score_rejected' "
                    f"with {worse:g}"
                )
            ours["margin"] = better - worse
        return ours | given(raw, "prompt")
    answers = objects_of(raw, "completions", source)
    by = "fine-grained_score"
    if not all(is_given(answer, by) for answer in answers):
        by = "overall_score"
    return {
        "prompt": column(raw, "instruction", source),
        "responses": [inner(answer, "response", "completions", source) for answer in answers],
        "scores": [inner(answer, by, "completions", source) for answer in answers],
    }


@reads(
    *("prompt", "response", "helpfulness"),
    *("context", "response1", "response2", "overall_preference"),
    *("response_1", "response_2", "preference_strength"),
)
def helpsteer(raw: Raw, source: str) -> Raw:
    """NVIDIA's answers with marks for helpfulness, or preferences from -3 to 3 (HelpSteer2 and 3).

    Above 0 the second response is the better one.
    """
    by = next((name for name in HELPSTEER_PAIRS if is_given(raw, name)), None)
    if by is None:
        return {
            "prompt": helpsteer_prompt(raw, source),
            "completion": column(raw, "response", source),
            "score": column(raw, "helpfulness", source),
        }
    better = as_number(raw[by])
    if better is None or not -3 <= better <= 3:
        raise RowError(f"{source}: column {by!r} holds {shown(raw[by])}, expected -3 to 3")
    if better == 0:
        raise RowError(f"{source}: column {by!r} is 0: neither response is better")
    sides = [column(raw, name, source) for name in HELPSTEER_PAIRS[by]]
    rejected, chosen = sides if better > 0 else sides[::-1]
    third = by == "overall_preference"
    return {
        "prompt": column(raw, "context", source) if third else helpsteer_prompt(raw, source),
        "chosen": chosen,
        "rejected": rejected,
        "margin": abs(better),
    }


def helpsteer_prompt(raw: Raw, source: str) -> str | list[Raw]:
    """A prompt as text, or as a dialogue where marks in it say who speaks."""
    asked = text_of(raw, "prompt", source)
    first, *rest = HELPSTEER_TURN.split(asked)
    turns = [{"role": "user", "content": first}]
    turns += [
        {"role": role.lower(), "content": text}
        for role, text in zip(rest[::2], rest[1::2], strict=True)
    ]
    return turns if rest else asked


@reads("info", "summaries", "choice", "prompt", "completion", *PAIR)
def tldr(raw: Raw, source: str) -> Raw:
    """OpenAI's comparisons of summaries, under the prompt of TRL's pairs; or those rows."""
    if not is_given(raw, "summaries"):
        return given(raw, "prompt", "completion", "chosen", "rejected")
    info, summaries = object_of(raw, "info", source), objects_of(raw, "summaries", source)
    choice = column(raw, "choice", source)
    if len(summaries) != 2 or isinstance(choice, bool) or choice not in (0, 1):
        raise RowError(f"{source}: expected two summaries and a choice of 0 or 1")
    texts = [inner(summary, "text", "summaries", source) for summary in summaries]
    if is_given(info, "article"):
        parts = [f"ARTICLE: {info['article']}"]
    else:
        post = inner(info, "post", "info", source)
        parts = [f"SUBREDDIT: r/{info['subreddit']}"] if is_given(info, "subreddit") else []
        parts += [f"TITLE: {info['title']}"] if is_given(info, "title") else []
        parts += [f"POST: {post}"]
    prompt = "\n\n".join([*parts, "TL;DR:"])
    return {"prompt": prompt, "chosen": texts[choice], "rejected": texts[1 - choice]}


@reads("question", "answers", "response_j", "response_k")
def stack_exchange(raw: Raw, source: str) -> Raw:
    """Answers with the votes for them, or the pairs made of them."""
    asked = column(raw, "question", source)
    if is_given(raw, "response_j"):
        better, worse = (column(raw, f"response_{side}", source) for side in "jk")
        return {"prompt": asked, "chosen": better, "rejected": worse}
    answers = objects_of(raw, "answers", source)
    texts = [inner(answer, "text", "answers", source) for answer in answers]
    scores = [inner(answer, "pm_score", "answers", source) for answer in answers]
    return {"prompt": asked, "responses": texts, "scores": scores}


@reads(*PAIR, "prompt", "margin")
def hh(raw: Raw, source: str) -> Raw:
    """A pair of Anthropic's HH dialogues, split before the assistant's last reply."""
    turn = "\n\nAssistant:"
    chosen, rejected = text_of(raw, "chosen", source), text_of(raw, "rejected", source)
    cut = chosen.rfind(turn) + len(turn)
    prompt = chosen[:cut]
    if turn not in chosen or not rejected.startswith(prompt):
        raise RowError(f"{source}: chosen and rejected do not share a dialogue up to {turn!r}")
    sides = {"chosen": chosen[cut:], "rejected": rejected[cut:]}
    for name, side in sides.items():
        if more := next((mark for mark in ("\n\nHuman:", turn) if mark in side), None):
            raise RowError(
                f"{source}: column {name!r} goes on with {more!r} after the reply that is compared"
            )
    return {"prompt": prompt, **sides, **given(raw, "margin")}
