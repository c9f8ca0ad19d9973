"""What is secret in the environment reaches no config, log or report."""

from pathlib import Path

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.secrets import redacted, refuse_secrets, secrets
from tests.conftest import Cli
from tests.pace import fast
from tests.tiny import DATA

KEY = "hf_0123456789abc"
ANSWERS = [*DATA, "algo.prompts=4", "algo.max_tokens=8", "policy=runs/demo/sft", "out=new"]
LEAKING = """
import os

def told(prompts, responses):
    raise ValueError("401 for " + os.environ["HF_TOKEN"])
"""
AT_IMPORT = (
    'import os\nraise ValueError(os.environ["HF_TOKEN"])\ndef score(prompts, responses): ...\n'
)


def test_names_that_are_secret() -> None:
    named = [
        *("HF_TOKEN", "GITHUBTOKEN", "my_secret", "DB_PASSWORD", "PGPASSWORD", "ROOT_PASSWD"),
        *("OPENAI_API_KEY", "API_KEY_2", "APIKEY", "AWS_SECRET_ACCESS_KEY", "X_KEY", "TOKENS"),
        *("AZURE_CREDENTIAL", "CREDENTIALS", "TOKEN_OF_CI", "DB_PASS", "PGPASS", "MYSQL_PWD"),
        *("GH_PAT", "AZURE_DEVOPS_EXT_PAT", "DATABASE_URL", "REDIS_URI", "SENTRY_DSN", "PASS"),
        *("SLACK_WEBHOOK", "SLACK_WEBHOOK_URL", "WEBHOOKS", "PROXY_AUTH", "SSH_PASSPHRASE"),
        *("AZURE_STORAGE_CONNECTION_STRING", "SESSION_COOKIE", "DB_PASSWD", "DISCORD_WEBHOOK_2"),
    ]
    plain = [
        *("TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "GOOGLE_CREDENTIALS_FILE", "KEYBOARD"),
        *("PWD", "OLDPWD", "PATH", "PATTERN", "BYPASS", "COMPASS", "SSH_AUTH_SOCK", "AUTHOR"),
        *("HF_ENDPOINT_URL", "DB_PASS_FILE", "HOME", "SECRETARY", "KEY", "MONKEY", "LC_KEYS"),
    ]
    found = secrets(dict.fromkeys((*named, *plain), "12345678"))
    assert set(found) == set(named)
    assert set(secrets({"X": "http://me:pass@host", "Y": "http://host/a:b@c"})) == {"X"}
    assert secrets({"HF_TOKEN": "1234567", "API_KEY": ""}) == {}  # too short to be told from text


def test_a_value_within_another_leaves_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "12345678")
    monkeypatch.setenv("B_TOKEN", "x12345678y")
    assert redacted("x12345678y, 12345678 and 1234567") == "[B_TOKEN], [A_TOKEN] and 1234567"


def test_values_are_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", 'line 1\nit\'s "2"')
    refuse_secrets({"a": None, "b": 1.5, "c": ["line 1", {"d": "it's"}]})
    for value in ([1, 'line 1\nit\'s "2"'], {"x": ['-line 1\nit\'s "2"-']}):
        with pytest.raises(UserError, match="^k holds the value of the variable A_KEY"):
            refuse_secrets({"a": 1, "k": value})
    with pytest.raises(UserError):
        refuse_secrets({"k": {'line 1\nit\'s "2"': 1}})


@pytest.mark.parametrize(
    "words",
    [
        ["ppo", "name=${oc.env:HF_TOKEN}"],
        ["ppo", "name=${oc.env:HF_TOKEN}", "--check"],
        ["ppo", "reward=x.py:${oc.env:HF_TOKEN}"],
        ["ppo", "data.columns.answer=${oc.env:HF_TOKEN}"],
        ["ppo", f"name=a-{KEY}"],
        ["ppo", f"hydra.job.name={KEY}"],
        ["ppo", "-m", "name=a,${oc.env:HF_TOKEN}"],
        ["ppo", "--config-dir", "mine", "algo=ppo", "data=mine"],
        ["evaluate", "baselines=[runs/a,${oc.env:HF_TOKEN}]"],
    ],
)
def test_a_config_with_a_secret_is_refused(words: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine/data").mkdir(parents=True)
    (tmp_path / "mine/data/mine.yaml").write_text("defaults: [demo]\ntemplate: ${oc.env:HF_TOKEN}")
    done = cli(*words, HF_TOKEN=KEY)
    assert done.returncode == 2, done.stderr
    assert "holds the value of the variable HF_TOKEN" in done.stderr
    assert KEY not in done.stdout + done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "words",
    [
        ["ppo", "algo.lr=${oc.env:HF_TOKEN}"],
        ["ppo", "--cfg", "job", "--resolve", "name=${oc.env:HF_TOKEN}"],
        ["ppo", "--info", "config", "name=${oc.env:HF_TOKEN}"],
        ["ppo", "--help", "name=${oc.env:HF_TOKEN}"],
        [KEY],
    ],
)
def test_what_is_printed_names_the_variable(words: list[str], cli: Cli, tmp_path: Path) -> None:
    done = cli(*words, HF_TOKEN=KEY)
    assert KEY not in done.stdout + done.stderr
    assert "[HF_TOKEN]" in done.stdout + done.stderr or "HF_TOKEN}" in done.stdout
    assert list(tmp_path.iterdir()) == []


def written(folder: Path) -> bytes:
    """All bytes of all files that the run wrote."""
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_a_function_that_says_its_key(cli: Cli, place: Path) -> None:
    """A client's exception often quotes the request, header and all."""
    (place / "mine.py").write_text(LEAKING)
    done = cli("generate", *ANSWERS, "reward=mine.py:told", HF_TOKEN=KEY)
    assert done.returncode == 1, done.stderr  # for nothing was scored
    assert "no reward" in done.stderr and "401 for [HF_TOKEN]" in done.stderr
    assert KEY not in done.stdout + done.stderr
    assert written(place / "new") and KEY.encode() not in written(place / "new")


@pytest.mark.parametrize("traceback", fast(["0"], ["0", "1"]))
def test_a_function_that_fails_as_it_is_loaded(traceback: str, cli: Cli, place: Path) -> None:
    (place / "mine.py").write_text(AT_IMPORT)
    words = ["generate", *ANSWERS, "reward=mine.py:score"]
    done = cli(*words, HF_TOKEN=KEY, RLHF_TRACEBACK=traceback)
    assert done.returncode == (1 if traceback == "1" else 2)
    assert "ValueError: [HF_TOKEN]" in done.stderr
    assert KEY not in done.stdout + done.stderr


@pytest.mark.parametrize("value", ["hunter2", "a/deeper/place", "12345"])
@pytest.mark.slow
def test_what_a_config_takes_stays_a_reference(value: str, cli: Cli, place: Path) -> None:
    """Whatever its variable's name, in every file and message; the path on stdout is the path."""
    words = [*ANSWERS, "name=${oc.env:PLAIN}", "out=${oc.env:PLAIN}-new"]
    done = cli("generate", *words, PLAIN=value)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{value}-new\n"
    assert value not in done.stderr and "[PLAIN]-new" in done.stderr
    out = place / f"{value}-new"
    assert value.encode() not in written(out)
    assert "name: ${oc.env:PLAIN}\n" in (out / "config.yaml").read_text()
    again = cli("generate", *words, PLAIN=value)
    assert again.returncode == 0 and "already finished" in again.stderr
    assert value not in cli("generate", *words, "seed=1", PLAIN=value).stderr


@pytest.mark.slow
def test_paths_and_numbers_that_a_config_takes(cli: Cli, place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "rows.jsonl").rename(place / "elsewhere/rows.jsonl")
    words = [*("sft", *DATA, "algo.max_steps=1", "out=new", "seed=${oc.env:SEED_OF_CI}")]
    words += ["data.path=${oc.env:ROWS}", "model.path=${oc.env:MODELS}/sft", "model=pretrained"]
    env = {"SEED_OF_CI": "7", "ROWS": "elsewhere/rows.jsonl", "MODELS": "runs/demo"}
    done = cli(*words, **env)
    assert done.returncode == 0, done.stderr
    files = written(place / "new")
    assert b"elsewhere" not in files and b"runs/demo" not in files
    assert b"\nseed: ${oc.env:SEED_OF_CI}\n" in files
    assert "already finished" in cli(*words, **env).stderr
    assert "runs/demo/sft" in cli("ls", "runs", "new", "runs", **env).stdout
    changed = cli(*words, **{**env, "SEED_OF_CI": "8"})
    assert changed.returncode == 2
    assert "made with another value of the variable SEED_OF_CI" in changed.stderr


@pytest.mark.slow
def test_figures_of_policies_that_a_config_takes(cli: Cli, place: Path) -> None:
    words = [*("evaluate", *DATA, "policy=${oc.env:POLICY}", "baselines=[]", "out=new")]
    words += ["reward=length:5", "gold=null", "algo.prompts=4", "algo.max_tokens=4"]
    done = cli(*words, POLICY="runs/demo/sft")
    assert done.returncode == 0, done.stderr
    assert b"runs/demo/sft" not in written(place / "new")
    assert "already finished" in cli(*words, POLICY="runs/demo/sft").stderr
