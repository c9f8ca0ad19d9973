"""Solutions whose steps are judged."""

from rlhf_cli.data.columns import column, is_given, shown
from rlhf_cli.data.labels import THUMBS, as_label
from rlhf_cli.data.messages import text_of
from rlhf_cli.data.raw import Raw, RowError
from rlhf_cli.data.readers import items_of
from rlhf_cli.data.shapes.shape import inner, object_of, objects_of, reads

RATINGS = {1: 1.0, 0: 1.0, -1: 0.0}
"""A step that is neither right nor wrong counts as right (Lightman 2305.20050, appendix F.2)."""
SHEPHERD_TAG = "\u043a\u0438"  # stands where the label has + or -


@reads("question", "label", "prompt", "completions", "labels", "input")
def prm800k(raw: Raw, source: str) -> Raw:
    """OpenAI's labelled steps, Math-Shepherd's, or TRL's {prompt, completions, labels}."""
    if is_given(raw, "completions"):
        labels = [as_label(label) for label in items_of(raw, "labels", source)]
        if None in labels:
            has = shown(items_of(raw, "labels", source)[labels.index(None)])
            raise RowError(f"{source}: column 'labels' holds {has}, expected {THUMBS}")
        asked, steps = column(raw, "prompt", source), raw["completions"]
        return {"prompt": asked, "steps": steps, "labels": labels}
    if isinstance(raw.get("label"), str) and is_given(raw, "input"):
        return math_shepherd(raw, source)
    question = object_of(raw, "question", source)
    asked = inner(question, "problem", "question", source)
    answer = (
        {"answer": question["ground_truth_answer"]} if "ground_truth_answer" in question else {}
    )
    label = object_of(raw, "label", source)
    if label.get("finish_reason") == "bad_problem":
        raise RowError(f"{source}: the labeller called this a bad problem")
    steps, ratings = [], []
    for step in objects_of(label, "steps", source):
        text, rating = step_taken(step, source)
        if rating is None:
            break  # what comes after a step that nobody judged is judged on other grounds
        steps.append(text)
        ratings.append(RATINGS[rating])
    return {"prompt": asked, "steps": steps, "labels": ratings, **answer}


def step_taken(step: Raw, source: str) -> tuple[str, int | None]:
    """The step that the solution went on with, and its rating: a person's own is right.

    Where it went on with none, its first one.
    """
    human = step.get("human_completion")
    if isinstance(human, dict):
        return inner(human, "text", "human_completion", source), 1
    steps = objects_of(step, "completions", source)
    place = step.get("chosen_completion") or 0
    if not isinstance(place, int) or not 0 <= place < len(steps):
        raise RowError(f"{source}: chosen_completion {shown(place)} is none of {len(steps)} steps")
    rating = steps[place].get("rating")
    if rating not in (None, *RATINGS):
        raise RowError(f"{source}: a rating is -1, 0 or 1, this one holds {shown(rating)}")
    return inner(steps[place], "text", "completions", source), rating


def math_shepherd(raw: Raw, source: str) -> Raw:
    """Steps that end in a tag in `input`, and in + or - in `label`."""
    text, label = text_of(raw, "input", source), text_of(raw, "label", source)
    pieces = text.split(SHEPHERD_TAG)
    asked, step, first = pieces[0].partition("Step 1:")
    signs, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        signs.append(label[at : at + 1])
        at += 1
    if not step or not set(signs) <= {"+", "-"}:
        raise RowError(f"{source}: columns 'input' and 'label' are no steps with + and -")
    steps = [(step + first).strip(), *(piece.strip() for piece in pieces[1:-1])]
    return {"prompt": asked.strip(), "steps": steps, "labels": [sign == "+" for sign in signs]}
