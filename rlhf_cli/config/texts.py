r"""Text keys keep what was typed: `name=1.10` is no number, and `\n` breaks a line.

Hydra and YAML read numbers, truth values and dates out of words before anything knows which keys
hold texts. So the words of such keys are quoted before Hydra reads them, and in YAML files their
values are taken as they stand there. null stays null; quoted it is a text.

`\n` is a line break and `\t` a tab; doubled, as `\\n`, a backslash and a letter. Where a key may
hold a regular expression, every backslash stays: `\n` means the same there.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import yaml
from antlr4 import CommonTokenStream, InputStream, ParserRuleContext
from hydra._internal.grammar.functions import Functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf._utils import get_yaml_loader

from rlhf_cli.config import catalog
from rlhf_cli.config.own_files import MERGE
from rlhf_cli.config.stages import STAGES

_BREAKS = re.compile(r"(\\+)([nt])")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_CHARACTERS = {"n": "\n", "t": "\t"}
_HYDRAS = "\\()[]{}:=, \t"  # what its grammar escapes in words without quotes
_OF_TEXTS = ("choice", "shuffle", "sort", "str", "tag")  # functions of its grammar
_STRUCTURE = set("\"',[]")  # whoever writes these means more than one plain text
_NULL, _STR = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


def line_breaks(text: str) -> str:
    r"""A text with line breaks and tabs for `\n` and `\t`; `\\n` becomes a backslash and n."""

    def character(found: re.Match[str]) -> str:
        slashes, letter = found.groups()
        kept = slashes[: len(slashes) // 2]
        return kept + (_CHARACTERS[letter] if len(slashes) % 2 else letter)

    return _BREAKS.sub(character, text)


class TextKey(NamedTuple):
    """A key that holds a text, or a list or a map of texts.

    breaks: whether `line_breaks` is for them.
    """

    single: bool
    breaks: bool


@cache
def text_keys() -> dict[str, TextKey]:
    """The keys of all stages that hold texts alone: one, a list or a map of them, one or more."""
    return {
        key: TextKey(catalog.is_single(field), not catalog.may_hold_regex(field))
        for stage in STAGES
        for key, field in catalog.keys(stage).items()
        if catalog.is_text(field.type) or field.metadata.get("texts")
    }


# --------------------------------------------------------------------------- words


def as_typed(words: list[str], sweep: bool = False) -> list[str]:
    """The words of a command with the values of text keys quoted, as Hydra is to read them.

    Args:
        sweep: whether a comma between values separates jobs; else such a word is left to Hydra,
            which refuses it.
    """
    return [_quoted(word, sweep) for word in words]


def _quoted(word: str, sweep: bool) -> str:
    key, _, value = word.partition("=")
    known = _text_key(key.lstrip("+"))
    if known is None or not value:
        return word
    whole = f"{key}={_in_quotes(_plain(value, known.breaks))}"
    if known.single and not value.strip():
        return whole
    try:
        tree = _tree(word)
    except HydraException:  # no grammar has it, so it is one text, if it looks like one
        return word if _STRUCTURE & set(value) or not known.single else whole
    if known.single and _is_unquoted(tree.value()):
        return whole
    if tree.value().simpleChoiceSweep() and not sweep:
        return word
    parts, end = [], 0
    for primitive in _primitives(tree):
        text = _text_of(primitive, known.breaks)
        if text is not None:
            parts += [word[end : primitive.start.start], _in_quotes(text)]
            end = primitive.stop.stop + 1
    return "".join(parts) + word[end:]


def _is_unquoted(value: Any) -> bool:
    """Whether a word is one text without quotes, blanks around it included, and not null."""
    primitive = value.element() and value.element().primitive()
    kinds = {token.type for token in _tokens(primitive)} if primitive else {OverrideLexer.NULL}
    return not kinds <= {OverrideLexer.NULL} and OverrideLexer.QUOTED_VALUE not in kinds


def _tokens(primitive: Any) -> list[Any]:
    """What a value is made of, without blanks around it."""
    tokens = (child.symbol for child in primitive.getChildren())
    return [token for token in tokens if token.type != OverrideLexer.WS]


def _text_key(key: str) -> TextKey | None:
    """What is known of a key, or of an entry of a map, that holds text."""
    known, group = text_keys(), key.rpartition(".")[0]
    if key in known or group not in known:
        return known.get(key)
    return None if known[group].single else known[group]._replace(single=True)


def _tree(word: str) -> Any:
    """How Hydra's grammar reads a word.

    Raises:
        HydraException: it does not.
    """
    lexer = OverrideLexer(InputStream(word))
    parser = OverrideParser(CommonTokenStream(lexer))
    for each in (lexer, parser):
        each.removeErrorListeners()
        each.addErrorListener(HydraErrorListener())
    return parser.override()


def _primitives(node: Any) -> Iterator[Any]:
    """The values in a word that are texts: not the names of a map, nor arguments of numbers."""
    if isinstance(node, OverrideParser.PrimitiveContext):
        yield node
    elif isinstance(node, OverrideParser.FunctionContext) and node.ID().getText() not in _OF_TEXTS:
        return
    elif isinstance(node, ParserRuleContext):
        after_name = False  # an argument by name, as in shuffle(..., seed=1)
        for child in node.getChildren():
            if not after_name:
                yield from _primitives(child)
            after_name = isinstance(child, OverrideParser.ArgNameContext)


def _text_of(primitive: Any, breaks: bool) -> str | None:
    """The text that a value stands for; None where it is null."""
    kinds = [token.type for token in _tokens(primitive)]
    if kinds == [OverrideLexer.NULL]:
        return None
    if kinds == [OverrideLexer.QUOTED_VALUE]:
        value = HydraOverrideVisitor(Functions()).visitPrimitive(primitive)
        text = value.text if isinstance(value, QuotedString) else str(value)
        return line_breaks(text) if breaks else text
    return _plain(primitive.getText().strip(), breaks)


def _plain(text: str, breaks: bool) -> str:
    """The text of a value without quotes, where Hydra's grammar has escapes of its own."""

    def character(found: re.Match[str]) -> str:
        letter = found[1]
        if letter in _HYDRAS:
            return letter
        return _CHARACTERS[letter] if breaks and letter in _CHARACTERS else found[0]

    return _ESCAPED.sub(character, text)


def _in_quotes(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


# --------------------------------------------------------------------------- files


def load(text: str, package: str = "") -> Any:
    """What YAML means, but that text keys keep the text of the file.

    Args:
        package: the dotted name of the group whose keys the file sets; nothing for all keys.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    loader = get_yaml_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        _keep(node, f"{package}." if package else "", set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _keep(node: yaml.Node, prefix: str, seen: set[int]) -> None:
    """Make texts of the values of text keys in and below a map."""
    if not isinstance(node, yaml.MappingNode):
        return
    known = text_keys()
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if name.value == MERGE:
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _keep(each, prefix, seen)
        elif key in known:
            _as_text(value, known[key].breaks, seen)
        elif not prefix:
            _keep(value, f"{key}.", seen)


def _as_text(node: Any, breaks: bool, seen: set[int]) -> None:
    if id(node) in seen:  # by another name
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _as_text(each, breaks, seen)
    elif isinstance(node, yaml.MappingNode):
        for _, each in node.value:
            _as_text(each, breaks, seen)
    elif node.tag != _NULL:
        node.tag = _STR
        if breaks and node.style in (None, "'"):  # others have escapes of YAML's own, or none
            node.value = line_breaks(node.value)


def requoted(text: str) -> str:
    """YAML of Hydra's, written so that `load` reads the same."""
    if "\\" not in text:
        return text
    events = list(yaml.parse(text, Loader=yaml.SafeLoader))
    for event in events:
        if isinstance(event, yaml.ScalarEvent) and "\\" in event.value:
            event.style, event.implicit = '"', (True, True)
    return str(yaml.emit(events, allow_unicode=True))
