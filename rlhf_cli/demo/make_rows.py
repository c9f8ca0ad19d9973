"""Write the demo's rows, the same bytes every time: `python -m rlhf_cli.demo.make_rows [FOLDER]`.

Replies vary in quality: a careless clerk tells the price of the wrong toy one time in three and is
rude one time in five. Preferences are drawn from the gold score s with Bradley-Terry noise, P(a > b) =
sigmoid(s(a) - s(b)), rankings with Plackett-Luce noise, so a known share of the labels is wrong.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

from rlhf_cli.demo.gold import CLOSINGS, QUESTION, RUDE, UNSURE, gold_score

NAMES = ("Mia", "Tom", "Ana", "Ben", "Lily", "Max", "Zoe", "Sam", "Eva", "Leo", "Ida", "Jack")
TOYS = (
    *("kite", "boat", "drum", "doll", "ball", "car", "train", "bear", "bell", "hat"),
    *("flute", "robot", "puzzle", "rocket", "horse", "duck", "truck", "castle", "lamp", "book"),
)
COLOURS = ("red", "blue", "green", "yellow", "black", "white")
GREETINGS = ("Hello", "Good morning", "Hi")
PLACES = ("park", "garden", "kitchen", "street", "school", "river", "forest", "market")
FEELINGS = ("happy", "tired", "proud", "sad", "hungry", "excited", "calm", "curious")

SIZES = {
    "demonstrations": (3000, 200),
    "preferences": (3000, 400),
    "rankings": (600, 100),
    "prompts": (1000, 200),
    "text": (2000, 200),
}


def question(rng: random.Random) -> dict[str, str]:
    """A prompt with its checkable answer."""
    toys = rng.sample(TOYS, 2)
    prices = rng.sample(range(2, 20), 2)
    asked = rng.randrange(2)
    text = (
        f"{rng.choice(NAMES)}: The {toys[0]} costs {prices[0]} coins and "
        f"the {toys[1]} costs {prices[1]} coins. How much is the {toys[asked]}?"
    )
    return {"prompt": text, "answer": str(prices[asked])}


def reply(rng: random.Random, row: dict[str, str]) -> str:
    """What the careless clerk says: each part good, bad or missing on its own."""
    question = QUESTION.search(row["prompt"])
    assert question is not None
    name = question["name"]
    wares = [(question["toy1"], question["price1"]), (question["toy2"], question["price2"])]
    right = next(ware for ware in wares if ware[0] == question["asked"])
    wrong = next(ware for ware in wares if ware[0] != question["asked"])
    sentences = []
    if (draw := rng.random()) < 0.5:
        greeted = name if draw < 0.42 else rng.choice(NAMES)
        sentences.append(f"{rng.choice(GREETINGS)} {greeted}!")
    if (draw := rng.random()) < 0.9:
        toy, price = right if draw < 0.6 else wrong
        sentences.append(f"{rng.choice(('The', 'That'))} {toy} costs {price} coins.")
    else:
        sentences.append(f"{rng.choice(UNSURE)}.")
    if (draw := rng.random()) < 0.4:
        sentences.append(f"{rng.choice(CLOSINGS)}!")
    elif draw < 0.6:
        sentences.append(f"{rng.choice(RUDE)}!")
    return " ".join(sentences)


def demonstration(rng: random.Random) -> dict[str, object]:
    """One reply of the careless clerk."""
    row = question(rng)
    return {"prompt": row["prompt"], "completion": reply(rng, row)}


def preference(rng: random.Random) -> dict[str, object]:
    """Two different replies, chosen and rejected by a noisy judge (Bradley-Terry)."""
    row = question(rng)
    first, second = different_replies(rng, row, 2)
    margin = gold_score(row["prompt"], first) - gold_score(row["prompt"], second)
    if rng.random() >= 1 / (1 + math.exp(-margin)):
        first, second = second, first
    return {"prompt": row["prompt"], "chosen": first, "rejected": second}


def ranking(rng: random.Random) -> dict[str, object]:
    """Four different replies and their ranks, 1 the best, by a noisy judge (Plackett-Luce)."""
    row = question(rng)
    replies = different_replies(rng, row, 4)
    noisy = [gold_score(row["prompt"], text) - math.log(rng.expovariate(1.0)) for text in replies]
    order = sorted(range(4), key=lambda i: -noisy[i])
    return {
        "prompt": row["prompt"],
        "responses": replies,
        "ranks": [order.index(i) + 1 for i in range(4)],
    }


def different_replies(rng: random.Random, row: dict[str, str], count: int) -> list[str]:
    """`count` replies to one question, no two the same."""
    replies: list[str] = []
    while len(replies) < count:
        if (text := reply(rng, row)) not in replies:
            replies.append(text)
    return replies


def text(rng: random.Random) -> dict[str, object]:
    """General text about the same small world: a day out, or a walk over the market."""
    return {"text": rng.choice((day_out, market))(rng)}


def day_out(rng: random.Random) -> str:
    """Two or three sentences in which names, toys and colours come back."""
    name, friend = rng.sample(NAMES, 2)
    toy, colour = rng.choice(TOYS), rng.choice(COLOURS)
    sentences = [
        f"One day {name} went to the {rng.choice(PLACES)} with a {colour} {toy}.",
        f"{name} was {rng.choice(FEELINGS)} because {friend} lost the {colour} {toy}.",
        f"In the {rng.choice(PLACES)} {name} and {friend} saw {rng.randint(2, 19)} {toy}s.",
        f"{friend} gave the {toy} to {name} and both felt {rng.choice(FEELINGS)}.",
        f"Then they walked home from the {rng.choice(PLACES)}.",
    ]
    keep = sorted(rng.sample(range(5), rng.choice((2, 3))))
    return " ".join(sentences[i] for i in keep)


def market(rng: random.Random) -> str:
    """Prices that are read once and paid once or twice."""
    toys = rng.sample(TOYS, 3)
    prices = rng.sample(range(2, 20), 3)
    wares = [f"The {toy} costs {price} coins" for toy, price in zip(toys, prices, strict=True)]
    buys = [
        f"{rng.choice(NAMES)} bought the {toys[i]}. The {toys[i]} costs {prices[i]} coins."
        for i in rng.sample(range(3), rng.choice((1, 2)))
    ]
    return f"{wares[0]}, t{wares[1][1:]} and t{wares[2][1:]}. {' '.join(buys)}"


MAKERS: dict[str, Callable[[random.Random], dict[str, object]]] = {
    "demonstrations": demonstration,
    "preferences": preference,
    "rankings": ranking,
    "prompts": lambda rng: dict(question(rng)),
    "text": text,
}


def main(folder: Path) -> None:
    """Write `<kind>.train.jsonl` and `<kind>.eval.jsonl` for every kind; no prompt is in both."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (train_rows, eval_rows) in SIZES.items():
        rng = random.Random(f"rlhf-cli demo {kind}")
        rows: dict[str, dict[str, object]] = {}
        while len(rows) < train_rows + eval_rows:
            row = MAKERS[kind](rng)
            rows.setdefault(str(row.get("prompt", row.get("text"))), row)
        lines = [json.dumps(row) + "\n" for row in rows.values()]
        (folder / f"{kind}.train.jsonl").write_text("".join(lines[:train_rows]), encoding="utf-8")
        (folder / f"{kind}.eval.jsonl").write_text("".join(lines[train_rows:]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
