"""Pictures of reports: a PNG, the same each time, and no library of it before one is asked for."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cli.objectives.estimates import Bin, Calibration
from rlhf_cli.reporting.plots import WIDTH, reliability_picture

PAIRS = Calibration(0.1, [Bin(0.5, 0.55, 0.52, 0.5, 8), Bin(0.9, 0.95, 0.93, 0.8, 4)])
LABELS = Calibration(0.2, [Bin(0.0, 0.1, 0.05, 0.2, 3), Bin(0.9, 1.0, 0.97, 0.9, 1)])


@pytest.mark.parametrize("calibration", [PAIRS, LABELS, Calibration(0.0, [])])
def test_a_picture_is_a_png_and_the_same_each_time(
    calibration: Calibration, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("one.png", "two.png")]
    for file in files:
        reliability_picture(file, calibration, "runs/$demo/_reward$")
    one, two = (file.read_bytes() for file in files)
    assert one.startswith(b"\x89PNG\r\n\x1a\n")
    assert one == two
    width, height = struct.unpack(">II", one[16:24])  # they stand in the header
    assert 2 * WIDTH < width < 2.5 * WIDTH and height > WIDTH


def test_another_calibration_is_another_picture(tmp_path: Path) -> None:
    reliability_picture(tmp_path / "pairs.png", PAIRS, "a")
    reliability_picture(tmp_path / "labels.png", LABELS, "a")
    assert (tmp_path / "pairs.png").read_bytes() != (tmp_path / "labels.png").read_bytes()


def test_the_command_line_starts_without_what_draws() -> None:
    program = "import sys, rlhf_cli.cli, rlhf_cli.reporting.plots; print('altair' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
