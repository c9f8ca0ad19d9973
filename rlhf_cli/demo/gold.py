"""The gold score of a guide's reply: what a reader would see at a glance, as a plain function.

A child asks a question with one right number, and the guide replies:

    Mia asks: How many legs does a spider have?
    Guide: Hello Mia! A spider has 8 legs. Thank you for asking!

Training sees this score only through the labels that `make_rows` drew from it.
"""

import re

FACTS = {
    "legs": {
        "spider": 8,
        "crab": 10,
        "ant": 6,
        "bee": 6,
        "dog": 4,
        "cat": 4,
        "horse": 4,
        "duck": 2,
        "hen": 2,
        "snake": 0,
        "fish": 0,
    },
    "wheels": {"car": 4, "bicycle": 2, "tricycle": 3, "boat": 0, "kite": 0},
    "sides": {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "octagon": 8},
}
"""Part -> thing -> how many."""

QUESTION = re.compile(r"(?P<name>\w+) asks: .*?(?P<part>legs|wheels|sides).*? an? (?P<thing>\w+)")
GREETING = re.compile(r"(Hello|Good morning|Hi) (?P<name>\w+)")
FACT = re.compile(r"(An?|Every) (?P<thing>\w+) has (?P<number>\d+) (?P<part>\w+)")
CLOSINGS = ("Have a nice day", "Thank you for asking", "You are always welcome here")
RUDE = ("Now go away", "Read a book next time", "Stop wasting my time")
UNSURE = ("I do not know", "Maybe ask someone else")


def gold_score(prompt: str, response: str) -> float:
    """Quality of `response` to `prompt`, from 4 (right and kind) down without bound.

    The right number for the thing asked about is worth 2, anything else said as a fact -1; a
    greeting with the child's name 1 (with another name -1); one kind closing 1; every rude
    sentence -2; every sentence that is a repeat, or that no guide would say, -1.

    Raises:
        ValueError: `prompt` is not a question of this task.
    """
    question = QUESTION.search(prompt)
    if question is None:
        raise ValueError(f"not a question to the guide: {prompt!r}")
    score = 0.0
    seen: set[str] = set()
    for sentence in re.findall(r"[^.!?]+[.!?]?", response.strip()):
        kind, points = _judge(sentence.strip().rstrip(".!?"), question)
        score += -1.0 if kind in seen else points
        seen.add(kind)
    return score


def _judge(text: str, question: re.Match[str]) -> tuple[str, float]:
    """The kind of a sentence (a kind earns once) and its points."""
    if greeting := GREETING.fullmatch(text):
        return "greeting", 1.0 if greeting["name"] == question["name"] else -1.0
    if fact := FACT.fullmatch(text):
        expected = FACTS[question["part"]][question["thing"]]
        asked = (question["thing"], question["part"], str(expected))
        right = (fact["thing"], fact["part"], fact["number"]) == asked
        return "fact", 2.0 if right else -1.0
    if text in CLOSINGS:
        return "closing", 1.0
    if text in RUDE:
        return text, -2.0
    if text in UNSURE:
        return text, 0.0
    return text, -1.0
