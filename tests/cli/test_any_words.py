"""Whatever stands after a stage, `--check` answers it: status 0, or 2 with one line."""

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_cli.cli import main
from rlhf_cli.config import catalog
from rlhf_cli.config.stages import STAGES
from tests.cli.made import POLICY, ROWS, contents

ANY = settings(
    deadline=timedelta(seconds=10),  # an example that hangs fails
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW, MANY = 40, 100

STAGE = st.sampled_from(sorted(STAGES))
# What a shell passes on: any bytes but 0; those that are no UTF-8 come as half characters.
TEXT = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"])
    | st.sampled_from("={}[](),:'\"\\$@~+&#! \t\n\udc80\udcff"),
    max_size=12,
)
ODD = st.sampled_from(
    ["", "null", "~", "[]", "{}", "[", "${x}", "${oc.env:HOME}", "${seed}", "1e999", "-1", "0"]
    + ["nan", "true", "2.5", "9" * 400, "x" * 300, "a/b/c", "a,b", "{a:1}", "[1,[2]]", "'", '"']
    + ["${oc.decode:x}", "glob(*)", "choice(1,2)", "range(1,3)", "1_000", "0x10", "\\", "???", "."]
    + ["/dev/null", "/dev/zero", "/proc/self/mem", "..", "~/x", "regex:(", "length:x", "a.py:f"]
    + ["1*", "0*json", "json + json", " + ", "é" * 2000, "\udcff", "lexicon:/dev/null", "-"]
)
NUMBERS = ["0", "1", "2", "3", "8", "0.5", "1e-3", "-1", "1e9", "9007199254740991", "null"]
WORDS = (
    ["null", "text", "{prompt}\\n", "json", "5min", "runs", "new", "demo", "[]", "nobody/nothing"]
    + ["runs/demo/sft", "runs/demo/reward", "runs/demo/adapter", "rows.jsonl", "[runs/demo/sft]"]
    + ["{answer: prompt}", "{prompt: chosen}", "bootstrap", "runs/demo/reward + 0.5*length:20"]
)


def values(stage: str, key: str) -> st.SearchStrategy[str]:
    """Values for a key: of its own type twice as often as others."""
    if key not in catalog.keys(stage):
        return ODD | TEXT
    choices = [*catalog.choices(stage, key), "true", "false"]
    kind = catalog.describe(stage, key)
    fit = NUMBERS if kind.startswith(("integer", "number")) else WORDS
    own = st.sampled_from(fit if kind.startswith(("integer", "number", "text")) else choices)
    return own | own | ODD | TEXT


@st.composite
def words(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A stage with a few words: keys and groups of it with odd values, changed ones, any text."""
    stage = draw(STAGE)
    names = [*catalog.keys(stage), *catalog.GROUPS, "polcy", "algo.klcoef", "data.columns.prompt"]
    made = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(names))
        word = f"{key}={draw(values(stage, key))}"
        change = draw(st.integers(0, 19))
        if change == 0:
            word = draw(TEXT)
        elif change == 1:
            spot = draw(st.integers(0, len(word)))
            word = word[:spot] + draw(TEXT) + word[spot + draw(st.integers(0, 2)) :]
        elif change == 2:
            word = draw(st.sampled_from(["+", "++", "~", "-", "--"])) + word
        made.append(word)
    if draw(st.integers(0, 9)) == 0:
        made.append("-m")
    return stage, made


BASE = f"{ROWS} out=new"
NEEDED = {
    "sft": "model.context=64",
    "ppo": "algo.max_tokens=8",
    "grpo": "algo.max_tokens=8 reward=json",
    "generate": f"algo.max_tokens=8 policy={POLICY}",
    "evaluate": f"algo.max_tokens=8 policy={POLICY} gold=json",
}


def check(given: tuple[str, list[str]], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The words after those that make the stage pass."""
    stage, rest = given
    before = contents(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        passing = f"{BASE} {NEEDED.get(stage, '')}".split()
        patch.setattr("sys.argv", ["rlhf-cli", stage, *passing, *rest, "--check"])
        status = main()
    shown = capfd.readouterr()
    assert status in (0, 2), shown.err
    assert "Traceback" not in shown.err
    if status == 2:
        assert shown.err.startswith("rlhf-cli: error: ")
        assert shown.err.count("\n") == 1, shown.err
        assert shown.out == ""
    assert contents(folder) == before


@settings(ANY, max_examples=FEW)
@given(given=words())
@pytest.mark.slow
def test_any_words(
    place: Path, capfd: pytest.CaptureFixture[str], given: tuple[str, list[str]]
) -> None:
    check(given, place, capfd)


@pytest.mark.slow
@settings(ANY, max_examples=MANY)
@given(given=words())
def test_many_words(
    place: Path, capfd: pytest.CaptureFixture[str], given: tuple[str, list[str]]
) -> None:
    check(given, place, capfd)
