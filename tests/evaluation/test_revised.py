"""Critique and revision: by an endpoint that follows a rule, and by a policy in this process."""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import demo
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import Interrupted, RunError, UserError
from rlhf_cli.data.kinds import Demonstration
from rlhf_cli.data.rows import Rows
from rlhf_cli.demo.gold import FACTS, QUESTION, gold_score
from tests.endpoints import ODD, FakeEndpoint
from tests.tiny import DATA

Choose = Callable[[str], dict[str, Any] | bytes | None]
WORDS = [
    *(word for word in DATA if "eval" not in word),
    *("policy=runs/demo/sft", "algo.prompts=5", "algo.samples=2", "algo.max_tokens=6"),
]


@pytest.fixture
def served() -> Iterator[Callable[[Choose], FakeEndpoint]]:
    servers: list[FakeEndpoint] = []

    def start(choose: Choose) -> FakeEndpoint:
        servers.append(FakeEndpoint(choose))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


def said(text: str, reason: str = "stop") -> dict[str, Any]:
    return {"message": {"content": text}, "finish_reason": reason}


def response_in(text: str) -> str:
    return re.split("\n\n(?:Say in|A critique)", text.split("Response:\n")[1])[0]


def kinder(text: str) -> dict[str, Any]:
    """Names a fault, and mends it by the critique: each revision is the text with a + more."""
    if text.endswith("Critique: "):
        return said(f"lacks + ({response_in(text)})")
    assert f"lacks + ({response_in(text)})" in text  # what it is asked to mend is what it said
    return said(f" {response_in(text)}+\n")


def generate(out: Path, *more: str) -> Path:
    cfg: Any = compose("generate", [*WORDS, *more, f"out={out}"])
    made: Path = importlib.import_module("rlhf_cli.stages.generate").run(cfg)
    return made


def words_for(server: FakeEndpoint, folder: Path, *more: str) -> list[str]:
    file = folder / "principles.txt"
    file.write_text("Be kind.\nBe brief.\n")
    return [f"reviser={server.url}", "reviser_model=fake", f"principles={file}", *more]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.usefixtures("inside")
def test_each_response_is_criticised_and_revised(
    served: Callable[[Choose], FakeEndpoint], tmp_path: Path
) -> None:
    server = served(kinder)
    words = words_for(server, tmp_path, "algo.revisions=2", "reviser_concurrency=2")
    out = generate(tmp_path / "out", *words)
    samples = [row["response"] for row in read(out / "samples.jsonl")]
    revisions, rows = read(out / "revisions.jsonl"), read(out / "demonstrations.jsonl")
    assert [each["response"] for each in revisions] == [text for text in samples if text.strip()]
    for each in revisions:
        texts = [step["revision"] for step in each["revisions"]]
        assert texts == [f"{each['response']}+".strip(), f"{each['response']}+".strip() + "+"]
    ends = {(each["prompt"], each["revisions"][-1]["revision"]) for each in revisions}
    assert {(row["prompt"], row["completion"]) for row in rows} == ends
    assert not any("Be " in json.dumps(row) for row in rows)  # without the principle
    assert len(server.asked) == 4 * len(revisions) and server.most <= 2
    drawn = [step["principle"] for each in revisions for step in each["revisions"]]
    assert set(drawn) == {"Be kind.", "Be brief."}
    assert any(first != second for first, second in zip(drawn[::2], drawn[1::2], strict=True))
    asked = server.asked[0]
    assert (asked["max_tokens"], asked["temperature"]) == (6, 1.0)
    manifest = json.loads((out / "stage.json").read_text())
    assert manifest["metrics"]["demonstrations"] == len(rows)
    assert manifest["metrics"]["revised"] == len(revisions) / 10
    assert manifest["metrics"]["revisions_changed"] == 1
    cfg = compose("sft", ["data=rows", f"data.path={out / 'demonstrations.jsonl'}"])
    found = Rows(cfg.data).split(Demonstration)
    assert len(found.train) + len(found.held_out) == len(rows)


@pytest.mark.usefixtures("inside")
def test_a_run_that_ended_goes_on_and_ends_alike(
    served: Callable[[Choose], FakeEndpoint], tmp_path: Path
) -> None:
    whole = served(kinder)
    words = ["algo.revisions=1", "reviser_concurrency=1"]
    expected = generate(tmp_path / "whole", *words_for(whole, tmp_path, *words))
    count = 0

    def fails(text: str) -> dict[str, Any] | None:
        nonlocal count
        count += 1
        return kinder(text) if count <= 12 else None

    broken = served(fails)
    broken.status = 503
    with pytest.raises(RunError, match="answered 503"):
        generate(tmp_path / "out", *words_for(broken, tmp_path, *words, "reviser_timeout=1"))
    assert not (tmp_path / "out/demonstrations.jsonl").exists()
    count = -1000
    before = len(broken.asked)
    out = generate(tmp_path / "out", *words_for(broken, tmp_path, *words, "reviser_timeout=9"))
    for name in ("demonstrations.jsonl", "revisions.jsonl"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert len(broken.asked) - before == len(whole.asked) - 12


@pytest.mark.usefixtures("inside")
def test_what_is_refused_or_cut_is_left_out_and_told(
    served: Callable[[Choose], FakeEndpoint],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = 0

    def choose(text: str) -> dict[str, Any] | None:
        nonlocal asked
        asked += text.endswith("Revision: ")
        if text.endswith("Revision: ") and asked in (1, 2):
            return said("half a", "length" if asked == 1 else "content_filter")
        return kinder(text) if asked not in (3, 4, 5, 6) else None

    words = words_for(served(choose), tmp_path, "algo.revisions=1", "reviser_concurrency=1")
    out = generate(tmp_path / "out", *words)
    shown = capsys.readouterr().err
    assert shown.count("reviser: no answer: http") == 3 and "answered 400" in shown
    assert re.search("reviser: no answer in 1 more of (8|9|10) calls", shown)
    told = "[678] of 10 responses are left out: (. empty, )?4 without a revision, 2 with .* was cut"
    assert re.search(told, shown)
    assert all(row["completion"] != "half a" for row in read(out / "demonstrations.jsonl"))
    with pytest.raises(RunError, match="none of 10 responses has a revision: .*a critique"):
        generate(tmp_path / "none", *words_for(served(lambda text: None), tmp_path, *words[3:]))


@pytest.mark.usefixtures("inside")
def test_what_is_no_answer_is_left_out_and_told(
    served: Callable[[Choose], FakeEndpoint],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With status 200, whether it was to be a critique or a revision: it ends no run."""
    left = list(ODD)
    words = ["algo.prompts=12", "algo.revisions=1", "reviser_concurrency=1"]

    def choose(text: str) -> dict[str, Any] | bytes | None:
        asks_in_turn = len(left) > len(ODD) / 2 or text.endswith("Revision: ")
        return left.pop() if left and asks_in_turn else kinder(text)

    out = generate(tmp_path / "out", *words_for(served(choose), tmp_path, *words))
    shown = " ".join(capsys.readouterr().err.split())
    revisions = read(out / "revisions.jsonl")
    responses = [row["response"] for row in read(out / "samples.jsonl")]
    assert not left and len(revisions) == sum(map(bool, map(str.strip, responses))) - len(ODD)
    assert "answered otherwise than asked: choices[0].message.content is" in shown
    for each in revisions:
        assert each["revisions"][0]["revision"] == f"{each['response']}+".strip()


@pytest.mark.usefixtures("inside")
def test_the_policy_revises_itself_as_in_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(kept: str) -> None:
        raise Interrupted(f"SIGTERM: {kept}")

    for name, text in {
        "principles": "Be kind.",
        "critique": "{response} {principle}? ",
        "revision": "{prompt}{response} {critique} ",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "critique").write_text("{prompt}{response}{principle}")
    words = [
        *("algo.revisions=1", "algo.max_tokens=4", f"principles={tmp_path / 'principles'}"),
        *(f"critique_prompt={tmp_path / 'critique'}", f"revision_prompt={tmp_path / 'revision'}"),
    ]
    out = generate(tmp_path / "out", *words)
    other = generate(tmp_path / "other", *words, "reviser=runs/demo/adapter")
    with monkeypatch.context() as signals:
        signals.setattr("rlhf_cli.evaluation.revisers.stop_if_asked", ended)
        with pytest.raises(Interrupted, match="what was revised is kept"):
            generate(tmp_path / "again", *words)
    again = generate(tmp_path / "again", *words)
    texts = [(each / "revisions.jsonl").read_bytes() for each in (out, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert read(out / "demonstrations.jsonl")
    (tmp_path / "revision").write_text("{prompt}{response}")
    with pytest.raises(UserError, match="lacks {critique}"):
        generate(tmp_path / "lacking", *words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["algo.revisions=1"], "algo.revisions=1 needs principles=VALUE"),
        (["principles=f"], "principles is not used by algo.revisions=0"),
        (["reviser=runs/demo/sft"], "reviser is not used by algo.revisions=0"),
        (["algo.revisions=1", "principles=f", "reviser=http://x"], "needs reviser_model=NAME"),
        (
            ["algo.revisions=1", "principles=f", "reviser=runs/x", "reviser_concurrency=2"],
            "reviser_concurrency is for endpoints",
        ),
        (
            ["algo.revisions=1", "principles=f", "algo.keep_best=1", "reward=length:9"],
            "both write demonstrations.jsonl",
        ),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        compose("generate", words)


def gold_of(policy: Path, out: Path) -> float:
    """The mean gold score of a policy of the demo, on prompts that are held out."""
    words = [f"policy={policy}", "reward=demo_gold", f"out={out}", "hardware.threads=1"]
    importlib.import_module("rlhf_cli.stages.generate").run(compose("generate", words))
    value: float = json.loads((out / "stage.json").read_text())["metrics"]["reward"]
    return value


@pytest.mark.slow
def test_what_is_learnt_from_revisions_is_better(
    served: Callable[[Choose], FakeEndpoint], tmp_path: Path
) -> None:
    """The demo, half learnt; who revises names what is rude or wrong, and mends it."""

    def revise(text: str) -> dict[str, Any]:
        question = text.split("Prompt:\n")[1].split("\n")[0]
        sentences = re.findall(r"[^.!?]+[.!?]", response_in(text))
        faults = [each for each in sentences if gold_score(question, each) <= 0]
        if text.endswith("Critique: "):
            return said(" ".join(faults) or "none")
        kept = [each.strip() for each in sentences if each not in faults]
        asked = QUESTION.search(question)
        assert asked is not None
        thing, part = asked["thing"], asked["part"]
        fact = f"Every {thing} has {FACTS[part][thing]} {part}."
        right = kept if any(f" {part}" in each for each in kept) else [*kept, fact]
        return said(" ".join([*right, "Thank you for asking!"]))

    server, sft = served(revise), importlib.import_module("rlhf_cli.stages.sft")
    policy, revised = tmp_path / "sft", tmp_path / "revised"
    short = ["hardware.threads=1", "algo.text_mix=0", "algo.eval_every=1000"]
    sft.run(compose("sft", [*short, "algo.max_steps=150", f"out={policy}"]))
    prompts = Path(demo.__file__).parent / "prompts.train.jsonl"
    rows = ["data=rows", f"data.path={prompts}", "data.eval_share=0.1", "algo.prompts=400"]
    words = [*rows, f"policy={policy}", "algo.max_tokens=40", "hardware.threads=1"]
    out = tmp_path / "out"
    cfg = compose(
        "generate", [*words, *words_for(server, tmp_path, "algo.revisions=1", f"out={out}")]
    )
    importlib.import_module("rlhf_cli.stages.generate").run(cfg)
    data = ["data=rows", f"data.path={out / 'demonstrations.jsonl'}", "data.eval_share=0.1"]
    more = ["model=pretrained", f"model.path={policy}", "algo.epochs=3", f"out={revised}"]
    sft.run(compose("sft", [*short, *data, *more]))
    before, after = (gold_of(each, tmp_path / f"gold_{each.name}") for each in (policy, revised))
    assert after > before + 1
