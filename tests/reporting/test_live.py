"""What a live view draws of a run, at any size of a terminal."""

from rich.cells import cell_len

from rlhf_cli.reporting.live import (
    METRICS,
    MOST_POINTS,
    SAMPLES,
    Course,
    Progress,
    Series,
    View,
    bar_line,
    clipped,
    clock,
    drawn,
    sparkline,
)

BAR = Progress("ppo", 50, done=10, before=4, seconds=12.0, note="reward 0.5")
LONG = "Hi Rosa! " + "An octagon has 8 sides, 漢字, and \x1b[2J a tail of words. " * 9


def online() -> Course:
    course = Course("ppo")
    for step in (1, 2, 3):
        gold = {"eval/gold": -step, "eval/gold_stderr": 0.25} if step > 1 else {"eval/gold": None}
        row = {"reward": step / 2, "kl": 0.1 * step, "entropy": 1.0, "alarm/kl": int(step == 3)}
        course.hear(METRICS, {"step": step, **row, **gold})
        for prompt in ("again", f"only at {step}")[:: -1 if step == 3 else 1]:
            course.hear(
                SAMPLES,
                {"step": step, "prompt": prompt, "response": f"{LONG}{step}", "reward": step},
            )
    return course


def text(view: View, width: int, height: int, plain: bool = False) -> list[str]:
    return [line.plain for line in drawn(view, width, height, plain)]


def test_rate_and_time_left_are_of_what_this_process_did() -> None:
    assert (BAR.rate(), BAR.left()) == ("2.0 s each", 80.0)
    assert Progress("x", 9, done=4, before=4, seconds=3.0).left() is None
    assert Progress("x", 3, done=5, seconds=1.0).left() == 0  # a total may be a guess
    assert [clock(each) for each in (9.4, 754, 3723)] == ["0:09", "12:34", "1:02:03"]


def test_a_long_course_is_kept_in_little_memory_with_its_first_and_last_value() -> None:
    series = Series()
    for i in range(100_000):
        series.add(float(i), None)
    points = series.points(10)
    assert (series.first, series.last, len(points)) == (0.0, 99_999.0, 10)
    assert len(series._means) < 2 * MOST_POINTS and points == sorted(points)
    assert abs(points[0] - 5_000) < 500 and abs(points[-1] - 95_000) < 500


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 7, 3.4]) == "▁█▄"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0, 1], plain=True) == "_#"


def test_what_matters_of_a_stage_is_shown_and_the_newest_response_to_a_known_prompt() -> None:
    lines = text(View("runs/x", ["a note"], [BAR], online()), 79, 40)
    assert lines[:2] == ["runs/x", "a note"]
    assert "10/50" in lines[2] and "2.0 s each" in lines[2] and "1:20 left" in lines[2]
    assert [line.split()[0] for line in lines[3:6]] == ["reward", "eval/gold", "kl"]
    assert lines[3].endswith("0.5 → 1.5") and lines[4].endswith("-2 → -3.00 ± 0.25")
    assert lines[6] == "alarm/kl"
    assert lines[7:9] == ["prompt: again", "step 1, reward 1"]
    assert "step 3, reward 3" in lines  # of this prompt, though another came first at step 3


def test_two_responses_stand_side_by_side_where_there_is_room() -> None:
    lines = text(View(course=online()), 120, 40)
    (heads,) = (line for line in lines if "step 1" in line)
    assert "step 3, reward 3" in heads


def test_nothing_is_wider_or_higher_than_the_terminal_and_no_control_is_sent() -> None:
    inner = Progress("reference log-probs\x1b[2J", 3, note=LONG)
    view = View(LONG, [LONG], [BAR, inner], online())
    for width in (1, 2, 5, 10, 19, 40, 79, 80, 100, 200):
        for height in (1, 2, 5, 10, 40):
            for plain in (False, True):
                lines = text(view, width, height, plain)
                assert len(lines) <= height
                assert max(map(cell_len, lines)) <= max(width, 2), (width, lines)
                assert not any("\x1b" in line for line in lines)
    assert all(line.isascii() for line in text(View("é", [], [BAR]), 79, 20, True)[1:])


def test_a_narrow_bar_keeps_its_count_and_the_time_left() -> None:
    for width, kept in ((79, 5), (34, 3), (24, 2), (12, 1)):
        line = bar_line(BAR, width, plain=True, note=False).plain
        parts = ("10/50", "1:20 left", "#", "2.0 s each", "0:12")
        assert [part in line for part in parts] == [True] * kept + [False] * (5 - kept), line


def test_peak_memory_stands_beside_the_time_left_of_the_outermost_activity() -> None:
    course = Course("ppo")
    view = View("", [], [BAR, Progress("inner", 2, done=1, seconds=1.0)], course)
    assert not any("GiB" in line for line in text(view, 79, 20))  # it is not known yet
    for row in ({"peak_memory": 0.412}, {"peak_memory": 3.456}, {"peak_memory": None}, {}):
        course.hear(METRICS, {"step": 1, **row})
    outer, inner = text(view, 79, 20)
    assert outer.endswith("2.0 s each  0:12  1:20 left  peak 3.46 GiB") and "GiB" not in inner
    assert text(view, 50, 20)[0] == "ppo  ━━───────  10/50  2.0 s each  0:12  1:20 left"
    assert course.figures() == []


def test_odd_rows_are_nothing() -> None:
    course = Course("dpo")
    course.hear(METRICS, {"step": 1, "loss": "nan", "eval/loss": None, "rewards/margin": True})
    course.hear(METRICS, {"loss": 1.0})
    course.hear(SAMPLES, {"step": 1})
    course.hear(SAMPLES, {"step": 2, "prompt": [{"role": "user"}], "response": ["x"]})
    assert course.figures() == []
    assert "['x']" in text(View(course=course), 60, 20)
    assert text(View(course=Course("unknown")), 60, 20) == []


def test_a_cut_text_has_a_mark() -> None:
    assert clipped("abcdef", 6) == "abcdef"
    assert clipped("abcdefg", 6) == "abcde…" and clipped("abcdefg", 6, plain=True) == "abc..."
    assert clipped("漢字漢字", 5) == "漢字…"
