"""Write the demo's rows, the same bytes every time: `python -m rlhf_cli.demo.make_rows [FOLDER]`.

Replies vary in quality: a careless guide gets a third of the numbers wrong and is rude one time in
five. Preferences are drawn from the gold score s with Bradley-Terry noise, P(a over b) =
sigmoid(s(a) - s(b)), and rankings with Plackett-Luce noise, so a known share of labels is wrong.
Thumbs go up with P = sigmoid(s - GOOD_ENOUGH), a visitor's marks are s and noise, rounded; labels
of steps are exact.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from rlhf_cli.demo.gold import CLOSINGS, FACTS, RUDE, UNSURE, gold_score

NAMES = (
    *("Mia", "Tom", "Ana", "Ben", "Lily", "Max", "Zoe", "Sam", "Eva", "Leo", "Ida", "Jack"),
    *(
        "Nora",
        "Paul",
        "Rosa",
        "Finn",
        "Emma",
        "Noah",
        "Ella",
        "Hugo",
        "Vera",
        "Luke",
        "June",
        "Otto",
    ),
)
ASKED = [(part, thing) for part, things in FACTS.items() for thing in things]
GREETINGS = ("Hello", "Good morning", "Hi")
PLACES = ("park", "garden", "kitchen", "street", "school", "river", "forest", "market")
FEELINGS = ("happy", "tired", "proud", "sad", "hungry", "excited", "calm", "curious")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")
GOOD_ENOUGH = 2.5  # the gold score at which thumbs go up half the time: for one reply in three
MARK_NOISE = 0.7
TOYS = ("drum", "doll", "ball", "train", "bear", "bell", "hat", "flute", "robot", "puzzle")

SIZES = {
    "demonstrations": (3000, 200),
    "preferences": (4000, 400),
    "rankings": (600, 100),
    "feedback": (3000, 300),
    "steps": (2000, 200),
    "prompts": (1000, 200),
    "text": (2000, 200),
}


class Question:
    """A child's question, the fact it asks for, and how the careless guide replies."""

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        """A child and a thing met in training never meet again in held-out questions."""
        self.rng = rng
        while True:
            self.name = rng.choice(NAMES)
            self.part, self.thing = rng.choice(ASKED)
            if (
                (NAMES.index(self.name) + ASKED.index((self.part, self.thing))) % 5 == 0
            ) == held_out:
                break
        self.number = FACTS[self.part][self.thing]
        form = rng.choice(
            (
                "How many {part} does {thing} have?",
                "Tell me how many {part} there are on {thing}.",
                "What is the number of {part} of {thing}?",
            )
        )
        asked = form.format(part=self.part, thing=with_article(self.thing))
        self.prompt = f"{self.name} asks: {asked}"

    def reply(self) -> str:
        """One reply of the careless guide."""
        return " ".join(self.sentences())

    def sentences(self) -> list[str]:
        """Greeting, fact and goodbye: each good, bad or missing on its own."""
        rng = self.rng
        sentences = []
        if (draw := rng.random()) < 0.5:
            greeted = self.name if draw < 0.42 else rng.choice(NAMES)
            sentences.append(f"{rng.choice(GREETINGS)} {greeted}!")
        if (draw := rng.random()) < 0.9:
            wrong = rng.choice([n for n in (0, 2, 3, 4, 5, 6, 8, 10) if n != self.number])
            number = self.number if draw < 0.6 else wrong
            subject = rng.choice((with_article(self.thing), f"every {self.thing}"))
            sentences.append(f"{subject.capitalize()} has {number} {self.part}.")
        else:
            sentences.append(f"{rng.choice(UNSURE)}.")
        if (draw := rng.random()) < 0.4:
            sentences.append(f"{rng.choice(CLOSINGS)}!")
        elif draw < 0.6:
            sentences.append(f"{rng.choice(RUDE)}!")
        return sentences

    def replies(self, count: int) -> list[str]:
        """`count` replies, no two the same."""
        texts: list[str] = []
        while len(texts) < count:
            if (text := self.reply()) not in texts:
                texts.append(text)
        return texts


def with_article(thing: str) -> str:
    """a dog, an ant."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def demonstration(rng: random.Random, held_out: bool) -> dict[str, object]:
    """One reply of the careless guide."""
    question = Question(rng, held_out)
    return {"prompt": question.prompt, "completion": question.reply()}


def preference(rng: random.Random, held_out: bool) -> dict[str, object]:
    """Two different replies, chosen and rejected by a noisy judge (Bradley-Terry)."""
    question = Question(rng, held_out)
    first, second = question.replies(2)
    margin = gold_score(question.prompt, first) - gold_score(question.prompt, second)
    if rng.random() >= 1 / (1 + math.exp(-margin)):
        first, second = second, first
    return {"prompt": question.prompt, "chosen": first, "rejected": second}


def ranking(rng: random.Random, held_out: bool) -> dict[str, object]:
    """Four different replies and their ranks, 1 the best, by a noisy judge (Plackett-Luce)."""
    question = Question(rng, held_out)
    replies = question.replies(4)
    gumbel = [-math.log(rng.expovariate(1.0)) for _ in replies]
    noisy = [gold_score(question.prompt, text) + g for text, g in zip(replies, gumbel, strict=True)]
    order = sorted(range(4), key=lambda i: -noisy[i])
    ranks = [order.index(i) + 1 for i in range(4)]
    return {"prompt": question.prompt, "responses": replies, "ranks": ranks}


def feedback(rng: random.Random, held_out: bool) -> dict[str, object]:
    """One reply with a visitor's thumbs, up (true) or down, and mark, higher for better."""
    question = Question(rng, held_out)
    completion = question.reply()
    gold = gold_score(question.prompt, completion)
    label = rng.random() < 1 / (1 + math.exp(GOOD_ENOUGH - gold))
    score = round(gold + rng.gauss(0, MARK_NOISE))
    return {"prompt": question.prompt, "completion": completion, "label": label, "score": score}


def steps(rng: random.Random, held_out: bool) -> dict[str, object]:
    """One reply in sentences: right are those that raise the gold score of what is said so far."""
    question = Question(rng, held_out)
    sentences = question.sentences()
    said = [" ".join(sentences[:count]) for count in range(len(sentences) + 1)]
    gold = [gold_score(question.prompt, text) for text in said]
    labels = [after > before for before, after in pairwise(gold)]
    return {"prompt": question.prompt, "steps": sentences, "labels": labels}


def prompt(rng: random.Random, held_out: bool) -> dict[str, object]:
    """A question with its checkable answer."""
    question = Question(rng, held_out)
    return {"prompt": question.prompt, "answer": str(question.number)}


def text(rng: random.Random, held_out: bool) -> dict[str, object]:
    """General text: a day out in which names, toys and colours come back."""
    name, friend = rng.sample(NAMES, 2)
    toy, colour = rng.choice(TOYS), rng.choice(COLOURS)
    sentences = [
        f"One day {name} went to the {rng.choice(PLACES)} with a {colour} {toy}.",
        f"{name} was {rng.choice(FEELINGS)} because {friend} lost the {colour} {toy}.",
        f"In the {rng.choice(PLACES)} {name} and {friend} saw a {rng.choice(ASKED)[1]}.",
        f"{friend} gave the {toy} to {name} and both felt {rng.choice(FEELINGS)}.",
        f"Then they walked home from the {rng.choice(PLACES)}.",
    ]
    keep = sorted(rng.sample(range(5), rng.choice((2, 3))))
    return {"text": " ".join(sentences[i] for i in keep)}


MAKERS: dict[str, Callable[[random.Random, bool], dict[str, object]]] = {
    "demonstrations": demonstration,
    "preferences": preference,
    "rankings": ranking,
    "feedback": feedback,
    "steps": steps,
    "prompts": prompt,
    "text": text,
}


def main(folder: Path) -> None:
    """Write `<kind>.train.jsonl` and `<kind>.eval.jsonl` of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, sizes in SIZES.items():
        for side, count in zip(("train", "eval"), sizes, strict=True):
            rng = random.Random(f"rlhf-cli demo {kind} {side}")
            rows = [MAKERS[kind](rng, side == "eval") for _ in range(count)]
            if (kind, side) == ("prompts", "eval"):  # each is judged once
                distinct = {row["prompt"]: row for row in rows}
                while len(distinct) < count:
                    row = prompt(rng, held_out=True)
                    distinct.setdefault(row["prompt"], row)
                rows = list(distinct.values())
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{kind}.{side}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
