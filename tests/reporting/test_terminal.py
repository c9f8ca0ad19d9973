"""What others wrote reaches a terminal as text, never as a command to it."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from rlhf_cli.reporting import console
from rlhf_cli.reporting.terminal import Shown, on_one_line, printable
from tests.conftest import Cli
from tests.terminals import on_a_terminal
from tests.tiny import DATA

EVIL = "\x1b]52;c;cm0gLXJm\x07\x1b[31mred\x9b2J\x7f\r\u202eab\u2066"
SEEN = r"\x1b]52;c;cm0gLXJm\x07\x1b[31mred\x9b2J\x7f\r\u202eab\u2066"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
GENERATE = [*("generate", *DATA, "algo.prompts=2", "algo.max_tokens=4", "out=new")]


def test_controls_are_shown() -> None:
    assert printable(EVIL) == SEEN
    assert printable("a\n\tb é 漢 🙂 \u200d") == "a\n\tb é 漢 🙂 \u200d"
    assert on_one_line("a\nb\tc\u2028") == r"a\nb\tc\u2028"
    assert printable("\udcc3") == r"\udcc3"


def test_a_stream_shows_them_whoever_writes() -> None:
    below = io.StringIO()
    stream = Shown(below)
    print("\rbar", EVIL, file=stream)
    stream.writelines([EVIL, "\n"])
    assert below.getvalue() == f"\rbar {SEEN}\n{SEEN}\n"


def test_lines_tables_and_bars_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(EVIL)
    console.table(EVIL, [EVIL, "n"], [(EVIL, 1)])
    with console.Bar(EVIL, 1) as bar:
        bar._began -= 2
        bar._shown -= 60
        bar.advance(note=EVIL)
    said = capsys.readouterr().err
    assert not CONTROLS.search(said)
    assert said.replace("\n", "").count(r"\x1b]52;c") >= 4, said


def test_a_bar_over_nothing_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.console, "_force_terminal", True)
    with console.Bar("reference log-probs", 0):
        pass
    assert capsys.readouterr().err == ""


def rows(file: Path, prompts: list[str]) -> None:
    file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))


@pytest.mark.slow
@pytest.mark.usefixtures("place")
class TestCommands:
    """Rows, templates, functions, paths and config values with controls in them."""

    @pytest.fixture
    def place(self, chain: Path, tmp_path: Path) -> Path:
        import shutil

        shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
        return tmp_path

    def test_samples(self, cli: Cli, place: Path) -> None:
        short = "\x1b[1m\x07\x9b"
        rows(place / "evil.jsonl", [f"{short} {i}" for i in range(4)])
        more = ["data.path=evil.jsonl", "data.eval_rows=2"]
        done = cli(*GENERATE, *more, "policy=runs/demo/sft")
        assert done.returncode == 0, done.stderr
        assert not CONTROLS.search(done.stderr) and r"\x1b[1m\x07\x9b" in done.stderr
        samples = (place / "new/samples.jsonl").read_text()
        assert not CONTROLS.search(samples)
        assert short in json.loads(samples.splitlines()[0])["prompt"]

    def test_functions_that_print_and_raise(self, cli: Cli, place: Path) -> None:
        (place / "mine.py").write_text(
            f"import logging, sys, warnings\nEVIL = {EVIL!r}\n"
            "def score(prompts, responses):\n"
            "    print(EVIL)\n    print(EVIL, file=sys.stderr)\n    logging.warning(EVIL)\n"
            "    warnings.warn(EVIL)\n    raise ValueError(EVIL)\n"
        )
        done = cli(*GENERATE, "policy=runs/demo/sft", "reward=mine.py:score")
        assert done.returncode == 1, done.stderr
        assert not CONTROLS.search(done.stderr)
        assert done.stderr.count("52;c;cm0gLXJm") >= 5

    @pytest.mark.parametrize(
        "words",
        [
            ["generate", f"policy={EVIL}"],
            ["generate", f"reward={EVIL}"],
            ["generate", f"{EVIL}=1"],
            ["generate", f"--{EVIL}"],
            ["generate", f"algo={EVIL}"],
            ["generate", f"data.path={EVIL}", "data=jsonl"],
            ["generate", "--config-dir", EVIL],
            ["generate", f"name='{EVIL}'", "--cfg", "job"],
            ["generate", f"name={EVIL}", "--help"],
            ["generate", "policy=runs/demo/sft", f"out={EVIL}", "data=demo", "--check"],
            [EVIL],
            ["ls", EVIL],
            ["ls", "runs", EVIL],
            ["cp", EVIL, "x"],
            ["cp", "demo", f"{EVIL}/"],
            ["env", EVIL],
        ],
    )
    def test_words(self, words: list[str], cli: Cli) -> None:
        done = cli(*words)
        assert not CONTROLS.search(done.stderr), done.stderr
        if words[0] != "cp":  # $(rlhf-cli cp ...) is the very path
            assert not CONTROLS.search(done.stdout), done.stdout

    def test_option_files(self, cli: Cli, place: Path) -> None:
        (place / "mine/algo").mkdir(parents=True)
        (place / f"mine/algo/{EVIL.replace('/', '')}.yaml").write_text("defaults: [sft]\nlr: 1\n")
        (place / "mine/algo/mine.yaml").write_text('"a\\e[31m": 1\n')
        for words in (["algo=mine"], ["algo=other"], ["--help"]):
            done = cli("sft", "--config-dir", "mine", *words)
            assert not CONTROLS.search(done.stderr + done.stdout)
        line = "rlhf-cli sft --config-dir mine algo="
        asked = cli("completion", "query", COMP_LINE=line, COMP_POINT=str(len(line)))
        assert "algo=mine" in asked.stdout and not CONTROLS.search(asked.stdout)

    def test_folders(self, cli: Cli, place: Path) -> None:
        (place / "r\x1b[31m\nred").mkdir()
        (place / "runs/demo/sft").rename(place / "r\x1b[31m\nred/sft")
        done = cli("ls", "runs", ".")
        assert r"r\x1b[31m\nred/sft" in done.stdout
        assert not CONTROLS.search(done.stdout + done.stderr)

    def test_manifests(self, cli: Cli, place: Path) -> None:
        file = place / "runs/demo/sft/stage.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "stage": EVIL, "parents": {EVIL: {"path": EVIL}}}))
        for words in (["ls", "runs"], ["generate", "--check", *DATA, "policy=runs/demo/sft"]):
            done = cli(*words)
            assert not CONTROLS.search(done.stdout + done.stderr)

    def test_the_path_is_exact_for_programs(self, cli: Cli, place: Path) -> None:
        done = cli("cp", "demo", "a\x1b[31m/")
        assert done.stdout == "a\x1b[31m/demo.yaml\n"

    def test_a_line_break_ends_no_comment(self, cli: Cli, place: Path) -> None:
        template = "data.template='{prompt}\nseed: 7\n'"
        done = cli(*GENERATE, "policy=runs/demo/sft", template)
        assert done.returncode == 0, done.stderr
        assert (place / "new/config.yaml").read_text().splitlines()[1].startswith("name:")

    def test_runs_where_lines_cannot_be_drawn(self, cli: Cli, place: Path) -> None:
        (place / "runs/demo/reward").rename(place / "runs/demo/é漢")
        done = cli("ls", "runs", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert done.returncode == 0 and done.stderr == ""
        assert "- runs/demo/adapter" in done.stdout
        assert "`- " in done.stdout and "|- " in done.stdout
        assert r"\xe9\u6f22" in done.stdout


def test_a_terminal_gets_colours_of_ours_alone(chain: Path) -> None:
    """On a terminal `ls runs` dims its lines; what leads to them is ours."""
    script = str(Path(sys.executable).parent / "rlhf-cli")
    said = on_a_terminal([script, "ls", "runs"], cwd=chain, columns=200)
    assert r"\x1b" not in said and "\x1b[2m" in said


BAR = """
import sys
from rlhf_cli.reporting.terminal import show_controls
show_controls()
before = sys.stderr
from rlhf_cli.reporting.console import Bar, say
with Bar("steps", 2) as bar:
    for _ in range(2):
        bar.advance(1, "loss 1.5")
        print("\\x1b[31mred \\x9b2J", file=sys.stderr)
        print("\\x1b]52;c;xx\\x07 on stdout")
        say("[bold]said")
assert sys.stderr is before
"""


def test_a_bar_on_a_terminal_is_drawn_and_what_others_write_is_shown() -> None:
    """Rich stands between while a bar is shown; the bar's own sequences are sent, others' not."""
    said = on_a_terminal([sys.executable, "-c", BAR])
    for word in (r"\x1b[31mred \x9b2J", r"\x1b]52;c;xx\x07 on stdout", "[bold]said"):
        assert said.count(word) == 2, said
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", said)
    assert (
        "\x1b[2K" in said
        and r"\x1b[2K" not in said
        and not CONTROLS.search(plain.replace("\r", ""))
    )
    assert re.search(r"steps  ━+  2/2 .* loss 1.5", plain)
