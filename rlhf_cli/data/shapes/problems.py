"""Problems with an answer, and solutions of them."""

from rlhf_cli.data.columns import OURS, column, shown
from rlhf_cli.data.kinds import Row
from rlhf_cli.data.labels import as_label
from rlhf_cli.data.messages import text_of
from rlhf_cli.data.raw import Raw, RowError
from rlhf_cli.data.readers import as_row
from rlhf_cli.data.shapes.shape import inner, object_of, reads


@reads("prompt")
def verl(raw: Raw, source: str) -> Raw:
    """A prompt and the answer that a rule compares with; all columns are kept for rules."""
    truth = inner(object_of(raw, "reward_model", source), "ground_truth", "reward_model", source)
    return {"prompt": column(raw, "prompt", source), "answer": truth}


@reads("question", "answer")
def gsm8k(raw: Raw, source: str) -> Raw:
    """A GSM8K problem: its solution is the demonstration, what follows #### the answer."""
    question, solution = text_of(raw, "question", source), text_of(raw, "answer", source)
    if "####" not in solution:
        raise RowError(f"{source}: column 'answer' has no '#### N'")
    answer = solution.split("####")[-1].strip()
    return {"prompt": question, "completion": solution, "answer": answer}


def solutions_in(raw: Raw) -> dict[str, Raw]:
    """The columns of a GSM8K row that hold a model's solution."""
    return {
        name: value
        for name, value in raw.items()
        if isinstance(value, dict) and {"solution", "is_correct"} <= set(value)
    }


def one_solution_each(raw: Raw) -> list[Raw]:
    """A GSM8K row once for each solution in it, so that a bad one spoils no other."""
    solutions = solutions_in(raw)
    rest = {name: value for name, value in raw.items() if name not in solutions}
    return [rest | {name: solution} for name, solution in solutions.items()] or [raw]


def gsm8k_solution(raw: Raw, source: str) -> Row:
    """A model's solution of a GSM8K problem, with whether it is right."""
    question = text_of(raw, "question", source)
    if not (solutions := solutions_in(raw)):
        columns = ", ".join(map(str, raw)) or "none"
        raise RowError(f"{source}: no column with {{solution, is_correct}}; found {columns}")
    ((model, entry),) = solutions.items()
    solution, verdict = f"{model}.solution", f"{model}.is_correct"
    label = as_label(entry["is_correct"])
    if label is None:
        value = shown(entry["is_correct"])
        raise RowError(f"{source}: column {verdict!r} holds {value}, expected true or false")
    text = text_of({solution: entry["solution"]}, solution, source)
    ours = {"prompt": question, "completion": text, "label": label, "source": model}
    rest = {name: raw[name] for name in raw if name not in ("question", model, *OURS)}
    return as_row(rest | ours, source)
