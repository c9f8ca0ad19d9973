"""What scores become before advantages are made of them, by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.objectives.moments import RunningMoments
from rlhf_cli.rewards.reward import Scores
from rlhf_cli.rewards.shaping import Shaped, shape
from rlhf_cli.rollout.rollouts import Rollout

PLAIN = {
    "scale_rewards": False,
    "reward_clip": None,
    "missing_eos_reward": None,
    "missing_eos_penalty": 0.0,
    "length_penalty": 0.0,
    "overlong_tokens": None,
    "sampled_tokens": 10,
}


def rollout(length: int, ended: bool = True) -> Rollout:
    tokens = Tokens([1], [5] * length)
    finish = "eos" if ended else "length"
    return Rollout(Prompt("say", {}, "row 1"), tokens, [0.0] * length, finish, "words")


ROLLOUTS = [rollout(4), rollout(8), rollout(10, ended=False)]


def shaped(values: list[float], running: RunningMoments | None = None, **changes: Any) -> Shaped:
    algo: Any = SimpleNamespace(**{**PLAIN, **changes})
    return shape(Scores(torch.tensor(values), {}, {}), ROLLOUTS, algo, running or RunningMoments())


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [3.0, -1.0, 2.0]),
        ({"reward_clip": 1.5}, [1.5, -1.0, 1.5]),
        ({"missing_eos_reward": -4.0}, [3.0, -1.0, -4.0]),
        ({"missing_eos_penalty": 0.5}, [3.0, -1.0, 1.5]),
        ({"length_penalty": 0.1}, [2.6, -1.8, 1.0]),
        ({"overlong_tokens": 4}, [3.0, -1.5, 1.0]),  # from 6 tokens on, 1 at 10
        ({"missing_eos_reward": -4.0, "length_penalty": 0.1}, [2.6, -1.8, -5.0]),
        ({"reward_clip": 1.0, "missing_eos_reward": -4.0}, [1.0, -1.0, -4.0]),
    ],
)
def test_penalties_and_limits(changes: dict[str, Any], expected: list[float]) -> None:
    close(shaped([3.0, -1.0, 2.0], **changes).total, expected)


def test_a_response_without_a_score_stays_without() -> None:
    close(shaped([math.nan, 1.0, 2.0], length_penalty=0.1).total, [math.nan, 0.2, 1.0])
    # but a response that never ended has its own reward
    close(shaped([1.0, 2.0, math.nan], missing_eos_reward=-1.0).total, [1.0, 2.0, -1.0])


def test_rewards_are_divided_by_the_spread_of_all_so_far() -> None:
    running = RunningMoments()
    close(
        shaped([2.0, 4.0, math.nan], running, scale_rewards=True).total, [2**0.5, 8**0.5, torch.nan]
    )
    again = shaped([0.0, 2.0, 7.0], running, scale_rewards=True).total  # of 2 4 0 2 7: std 2.6458
    close(again, [0.0, 2 / 7**0.5, 7 / 7**0.5])
    close(shaped([1.0, 1.0, 1.0], scale_rewards=True).total, [1.0, 1.0, 1.0])


def test_steps_are_clipped_one_by_one_and_the_response_bears_the_costs() -> None:
    algo: Any = SimpleNamespace(**{**PLAIN, "reward_clip": 1.0, "missing_eos_penalty": 0.5})
    steps = [torch.tensor([2.0, math.nan]), torch.tensor([math.nan]), torch.tensor([0.0, 0.25])]
    ends = [[1, 3], [7], [2, 9]]
    whole = torch.tensor([math.nan, math.nan, 3.0])
    total = torch.tensor([2.0, math.nan, 3.25])
    found = shape(Scores(total, {}, {}, steps, ends, whole), ROLLOUTS, algo, RunningMoments())
    assert found.steps is not None and found.ends == ends
    for each, expected in zip(found.steps, ([1.0, math.nan], [math.nan], [0, 0.25]), strict=True):
        close(each, expected)
    close(found.whole, [0.0, math.nan, 0.5])
    close(found.total, [1.0, math.nan, 0.75])


def test_an_evaluation_neither_scales_nor_cuts_at_the_scale() -> None:
    algo: Any = SimpleNamespace(**{**PLAIN, "scale_rewards": True, "reward_clip": 1.0})
    scores = Scores(torch.tensor([5.0, -7.0, 9.0]), {}, {})
    close(shape(scores, ROLLOUTS, algo, None).total, [5.0, -7.0, 9.0])
    algo.scale_rewards = False
    close(shape(scores, ROLLOUTS, algo, None).total, [1.0, -1.0, 1.0])


def test_what_was_not_charged_yet_tells_groups_apart() -> None:
    found = shaped([2.0, 2.0, 2.0], length_penalty=0.1, reward_clip=1.0)
    close(found.uncharged, [1.0, 1.0, 1.0])
    close(found.total, [0.6, 0.2, 0.0])
