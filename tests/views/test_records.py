"""Runs as their folders tell them."""

from pathlib import Path

from rlhf_cli.views.records import json_lines, read_record


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 0.5}\n[3]\n{"step": 2, "lo')
    assert list(json_lines(file)) == [{"step": 1, "loss": 0.5}]
    assert list(json_lines(tmp_path / "samples.jsonl")) == []


def test_a_folder_with_nothing_in_it_is_a_record_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[]")
    record = read_record(tmp_path)
    assert (record.manifest, record.metrics, record.report) == ({}, [], {})
    assert list(record.samples()) == []
