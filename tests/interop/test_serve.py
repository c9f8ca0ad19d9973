"""A real server as judge: `transformers serve`, with a model that always says A."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_cli.config.errors import RunError
from tests.evaluation.test_judges import config, report
from tests.evaluation.test_revised import generate, read
from tests.toys import bigram, bpe

pytestmark = pytest.mark.interop


def make_judge(place: Path) -> None:
    """Whatever it is asked, the likeliest word after `<|assistant|>` is A, and then the end."""
    tokenizer = bpe(chat=True)
    (asked,) = tokenizer.encode("<|assistant|>", add_special_tokens=False)[-1:]
    (letter,) = tokenizer.encode("A", add_special_tokens=False)[-1:]
    table = torch.zeros(len(tokenizer), len(tokenizer))
    table[asked, letter] = table[letter, tokenizer.eos_token_id] = 9.0
    model = bigram(table)
    model.config.max_position_embeddings = 4096
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one that serves that judge."""
    pytest.importorskip("fastapi")
    folder = tmp_path_factory.mktemp("served")
    make_judge(folder / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = Path(sys.executable).parent / "transformers"
    words = ["serve", "judge", "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, *words], cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_a_judge_that_always_says_a_is_found_out(server: str, tmp_path: Path) -> None:
    """It answers in words, with no log-probs, and tells what was read and written."""
    words = ["judge_model=judge", "judge_timeout=60", "judge_prices=[1,1]"]
    found, counts = report(config(server, tmp_path, *words))
    assert found["first_slot"]["mean"] == 1 and found["consistency"]["mean"] == 0
    wins = found["win_rates"]["theirs"]
    assert (wins["tie"], wins["pairs"], wins["failed"]) == (1, 8, 0)
    assert counts["calls"] == 16 and counts["completion_tokens"] == 16
    assert counts["prompt_tokens"] > 16 * 20
    _, counts = report(config(server, tmp_path, *words, f"out={tmp_path}/other"))
    assert (counts["calls"], counts["cached"]) == (0, 16)


def test_what_it_revises_says_a(
    server: str, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)
    file = tmp_path / "principles.txt"
    file.write_text("Be brief.")
    words = [f"reviser={server}", "reviser_model=judge", "reviser_timeout=60", "algo.prompts=2"]
    out = generate(tmp_path / "out", *words, "algo.revisions=1", f"principles={file}")
    assert {row["completion"] for row in read(out / "demonstrations.jsonl")} == {"A"}


def test_a_model_that_the_server_does_not_have(server: str, tmp_path: Path) -> None:
    """A refusal is no tie."""
    with pytest.raises(RunError, match="the judge has failed at all of 8 pairs"):
        report(config(server, tmp_path, "judge_model=other"))
