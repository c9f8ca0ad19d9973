"""The file that a page is: nothing that a text holds is seen as markup or run."""

import json
import re
from html.parser import HTMLParser

import pytest

from rlhf_cli.views.html import Section, as_json, hashed, page, script

HOSTILE = "</script><script>alert(1)</script><!--<script>\u2028\ud800 &amp; <img src=x onerror=y>"


class Reader(HTMLParser):
    """The elements of a page, and what stands in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, text: str) -> None:
        if self.inside:
            self.scripts[-1] += text


def test_data_is_read_as_it_was_and_never_as_markup() -> None:
    read = Reader(page("<b>", [Section("one", "One")], {"text": HOSTILE}, "var x = 1;"))
    data, *scripts = read.scripts
    assert json.loads(data) == {"text": HOSTILE}
    assert not {"b", "img"} & {tag for tag, _ in read.tags}
    assert all("alert" not in text for text in scripts)


def test_the_policy_names_each_script_and_allows_no_request() -> None:
    read = Reader(page("a", [], {}, 'a = "</script>";\r\n'))
    policy = next(
        each["content"] for tag, each in read.tags if tag == "meta" and "http-equiv" in each
    )
    assert policy is not None and policy.startswith("default-src 'none'; ")
    _, *scripts = read.scripts
    assert re.findall(r"'(sha256-[^']+)'", policy) == [hashed(text) for text in scripts]
    assert "unsafe-eval" not in policy and "http" not in policy


def test_a_secret_is_hidden_however_json_spells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", 'p\u00e4ss"word\\')
    monkeypatch.setenv("PIN_TOKEN", "12345678")  # as digits of a number, which stays one
    data = {"texts": ['a p\u00e4ss"word\\ b', "12345678"], "number": 0.12345678}
    texts = ["a [DB_PASSWORD] b", "[PIN_TOKEN]"]
    assert json.loads(as_json(data)) == {"texts": texts, "number": 0.12345678}


def test_a_script_does_not_end_early() -> None:
    assert script('a="</script>"') == r'a="<\/script>"'
    assert as_json({"a": "<&>"}) == r'{"a":"\u003c\u0026\u003e"}'
