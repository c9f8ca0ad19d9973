"""What a run takes over from the stage.json of the policy that it starts with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.runs.inherited import inherit


def policy(folder: Path, **said: Any) -> str:
    folder.mkdir()
    manifest = {"kind": "policy", "stage": "sft", "complete": True, **said}
    (folder / "stage.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 200}))
    return str(folder)


def config(path: str, *words: str) -> Any:
    rows = ["data=jsonl", "data.path=rows.jsonl"]
    return compose("generate", [f"policy={path}", *rows, *words])


def test_what_is_not_given_is_as_the_policy_was_trained(tmp_path: Path) -> None:
    limits = {"max_prompt_tokens": 70, "max_response_tokens": None, "longest_response": 40}
    said = {"template": "Q: {prompt}", "chat_args": {"a": 1}, "limits": limits}
    path = policy(tmp_path / "policy", **said)
    cfg = config(path)
    lines = inherit(cfg)
    data = cfg.data
    assert (data.template, data.chat_args, data.max_prompt_tokens) == ("Q: {prompt}", {"a": 1}, 70)
    assert data.max_response_tokens is None and cfg.algo.max_tokens == 40
    assert f"data.template='Q: {{prompt}}', as {path} was trained" in lines
    assert "algo.max_tokens=40" in lines
    before = replace(cfg.data)
    assert inherit(cfg) == [] and cfg.data == before  # once


def test_what_is_given_is_kept(tmp_path: Path) -> None:
    limits = {"max_response_tokens": 50, "longest_response": 40}
    path = policy(tmp_path / "policy", template="chat", limits=limits)
    cfg = config(path, "data.template='{prompt}!'", "data.max_response_tokens=8")
    inherit(cfg)
    assert (cfg.data.template, cfg.algo.max_tokens) == ("{prompt}!", 8)
    cfg = config(path)
    inherit(cfg)
    assert (cfg.data.template, cfg.algo.max_tokens) == ("chat", 50)


def test_a_policy_that_says_nothing_samples_up_to_half_of_its_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # away from runs in whose place this one would stand
    cfg = config(policy(tmp_path / "policy"))
    inherit(cfg)
    assert (cfg.data.template, cfg.algo.max_tokens) == (None, 100)
    cfg = config("some/hub_id")
    inherit(cfg)
    assert cfg.algo.max_tokens == 256
