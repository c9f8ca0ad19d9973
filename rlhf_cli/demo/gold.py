"""The gold score of a clerk's reply: what a reader would see at a glance, as a plain function.

A customer reads two prices aloud and asks for one of them:

    Mia: The kite costs 3 coins and the boat costs 5 coins. How much is the boat?
    Clerk: Hello Mia! The boat costs 5 coins. Have a nice day!

Training sees this score only through the labels that `make_rows` drew from it.
"""

import re

QUESTION = re.compile(
    r"(?P<name>\w+): The (?P<toy1>\w+) costs (?P<price1>\d+) coins and "
    r"the (?P<toy2>\w+) costs (?P<price2>\d+) coins\. How much is the (?P<asked>\w+)\?"
)
GREETING = re.compile(r"(Hello|Good morning|Hi) (?P<name>\w+)")
PRICE = re.compile(r"(The|That) (?P<toy>\w+) costs (?P<price>\d+) coins")
CLOSINGS = ("Have a nice day", "Thank you for asking", "You are always welcome here")
RUDE = ("Now go away", "Read the sign next time", "Stop wasting my time")
UNSURE = ("I do not know", "Maybe ask someone else")


def gold_score(prompt: str, response: str) -> float:
    """Quality of `response` to `prompt`, from 4 (right and kind) down without bound.

    The right price of the asked toy is worth 2, a wrong one -1; a greeting with the customer's
    name 1 (with another name -1); one kind closing 1; every rude sentence -2; every sentence that
    is a repeat, or that no clerk would say, -1.

    Raises:
        ValueError: `prompt` is not a question of this task.
    """
    question = QUESTION.search(prompt)
    if question is None:
        raise ValueError(f"not a toy-shop question: {prompt!r}")
    answer = question["price1" if question["asked"] == question["toy1"] else "price2"]
    score = 0.0
    seen: set[str] = set()
    for sentence in re.findall(r"[^.!?]+[.!?]?", response.strip()):
        text = sentence.strip().rstrip(".!?")
        kind, points = _judge(text, question["name"], question["asked"], answer)
        score += -1.0 if kind in seen else points
        seen.add(kind)
    return score


def _judge(text: str, name: str, asked: str, answer: str) -> tuple[str, float]:
    """The kind of a sentence (a repeated kind earns nothing) and its points."""
    if greeting := GREETING.fullmatch(text):
        return "greeting", 1.0 if greeting["name"] == name else -1.0
    if price := PRICE.fullmatch(text):
        right = price["price"] == answer and price["toy"] == asked
        return "price", 2.0 if right else -1.0
    if text in CLOSINGS:
        return "closing", 1.0
    if text in RUDE:
        return text, -2.0
    if text in UNSURE:
        return text, 0.0
    return text, -1.0
