"""The table of each policy against each other one."""

import re
from typing import Any

from rlhf_cli.views.matrix import matrix_figure
from tests.views.test_report import evaluation

WON = {"win": 0.5, "tie": 0.25, "loss": 0.25, "low": 0.5, "high": 0.75}
LOST = {"win": 0.0, "tie": 0.0, "loss": 1.0, "low": 0.0, "high": 0.1}


def lines_of(report: dict[str, Any]) -> list[list[str]]:
    """The texts of the cells, row by row."""
    figure = matrix_figure(report, str)
    assert figure is not None
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in figure.table.split("<tr>")[1:]]
    return [[re.sub("<[^>]*>", "", cell) for cell in row] for row in rows]


def test_each_against_each_other_one_the_best_first() -> None:
    report = evaluation("a", "<b>", "c")
    report["ratings"] = {name: report["ratings"][name] for name in ("c", "a", "<b>")}
    report["head_to_heads"] = {
        "a": {"<b>": WON, "c": LOST},
        "<b>": {"a": LOST, "c": {"win": None, "tie": 0.1}},
        "c": {"a": WON, "<b>": WON},
    }
    assert lines_of(report) == [
        ["policy", "c", "a", "&lt;b&gt;"],
        ["c", "", "0.62", "0.62"],
        ["a", "0.00", "", "0.62"],
        ["&lt;b&gt;", "–", "0.00", ""],
    ]
    figure = matrix_figure(report, str)
    assert figure is not None and 'title="0.625, 95%: 0.500 to 0.750"' in figure.table
    assert figure.table.count("--side: var(--bad); --far: 45%") == 2  # of none won
    assert figure.table.count("--side: var(--good); --far: 11%") == 3  # 0.9 * 0.125


def test_reports_of_old_versions_have_a_row_alone() -> None:
    report = evaluation("a", "b", "c") | {"head_to_heads": None, "ratings": None}
    report["win_rates"] = {"b": WON, "c": LOST | {"low": None}}
    assert lines_of(report) == [["policy", "b", "c"], ["a", "0.62", "0.00"]]
    assert matrix_figure(report | {"win_rates": {}}, str) is None


def test_more_policies_than_have_room_beside_others_take_the_width_of_the_page() -> None:
    for count, whole in ((7, False), (8, True)):
        figure = matrix_figure(evaluation(*(f"p{i}" for i in range(count))), str)
        assert figure is not None and figure.whole == whole
