"""Whether text varies, repeats itself and copies, by hand."""

import pytest
import torch

from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.evaluation.figures import Sampled
from rlhf_cli.evaluation.text_health import Seen, distinct, rouge, self_bleu, text_figures
from rlhf_cli.rewards.reward import Scores
from rlhf_cli.rollout.rollouts import Rollout

TRAINED = "one two three four five six seven eight nine"


def sampled(*texts: str, samples: int = 2) -> Sampled:
    rollouts = [Rollout(Prompt("p"), Tokens([1], [2]), [], "eos", text) for text in texts]
    return Sampled(rollouts, {"gold": Scores(torch.zeros(len(texts)), {}, {})}, samples)


def test_worked_shares_of_distinct_runs() -> None:
    assert distinct(["a b a", "b c"], 1) == 3 / 5
    assert distinct(["a b a", "b c a b"], 2) == 4 / 5
    assert distinct(["a", ""], 2) is None


def test_copies_are_runs_of_eight_words_and_whole_responses() -> None:
    seen = Seen([TRAINED, "short one"])
    assert seen.share(TRAINED) == 1
    assert seen.share(f"{TRAINED} ten") == 2 / 3  # the last run of eight is its own
    assert seen.share("short one") == 0 and seen.holds("short\n one")
    assert not seen.holds(f"{TRAINED} ten")


def test_figures_are_clustered_by_prompt() -> None:
    texts = [TRAINED, TRAINED, "a b c d a b c d", "nothing of it"]
    found = text_figures(sampled(*texts), [None, None], Seen([TRAINED]))
    assert found["copied"] == {"mean": 0.5, "stderr": 0.5}
    assert found["verbatim"] == {"mean": 0.5, "stderr": 0.5}
    # of five runs of four the last is the first again: 1/5 of one response of four
    assert found["repetition"]["mean"] == pytest.approx(0.05)
    assert "copied" not in text_figures(sampled(*texts), [None, None], None)
    assert "bleu" not in found


@pytest.mark.interop
def test_bleu_against_the_other_responses_and_the_references() -> None:
    assert self_bleu([TRAINED, TRAINED]) == pytest.approx(1)
    assert self_bleu([TRAINED, "alpha beta gamma delta"]) < 0.05
    texts = [TRAINED, TRAINED, "a b c d", "e f g h"]
    found = text_figures(sampled(*texts), [TRAINED, None], None)
    assert found["bleu"]["mean"] == pytest.approx(1)
    assert found["self_bleu"]["mean"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.interop
def test_worked_rouge_and_that_of_the_library() -> None:
    # of four words and five three are shared, and one pair of three and four; they stand in order
    said, text = "the cat sat on mats", "The cat, then sat"
    worked = {"rouge_1": 2 * 3 / 9, "rouge_2": 2 * 1 / 7, "rouge_l": 2 * 3 / 9}
    assert rouge([([text], said)]) == {
        name: [[pytest.approx(value)]] for name, value in worked.items()
    }
    from rouge_score.rouge_scorer import RougeScorer

    plain = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(said, text)
    assert [each.fmeasure for each in plain.values()] == pytest.approx(list(worked.values()))
    # a script that the library's own words leave nothing of
    assert rouge([(["кот сидел"], "кот спал")])["rouge_1"] == [[pytest.approx(0.5)]]
    assert rouge([(["", "a"], "a")])["rouge_l"] == [[0, 1]]
    found = text_figures(sampled("a", "b", "c", "d"), [None, "c e"], None)
    assert found["rouge_1"]["mean"] == pytest.approx(1 / 3)  # of the one prompt that has one
