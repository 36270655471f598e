"""YAML text to plain values, with the line of every key.

The scalars are those of the core schema of YAML 1.2, which is what people expect: `1e-4` is a number, `off` and `no`
are text, only `true` and `false` are booleans. Keys are always text, duplicate keys and tags are errors, and aliases
may expand to a bounded size only.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from align.errors import RecipeError
from align.recipe.origins import Loc

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_VALUES = 20_000
"""Values of one document after its aliases are expanded: far above any recipe, far below a bomb."""

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Loader(yaml.SafeLoader):
    """Reads nodes only; `_Builder` makes the values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"found the tag {event.tag!r}", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        # The line breaks of Unicode survive in double quotes only.
        return self.represent_scalar(_TAG + "str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


_Loader.yaml_implicit_resolvers = {}  # forget what YAML 1.1 takes for numbers, dates and booleans
for _kind in (_Loader, _Dumper):
    for _name, _pattern, _first in (
        ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
        ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
        ("int", re.compile(f"^(?:{_INT.pattern})$"), list("-+0123456789")),
        ("float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+0123456789.")),
        ("merge", re.compile(r"^(?:<<)$"), ["<"]),
    ):
        _kind.add_implicit_resolver(_TAG + _name, _pattern, _first)


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        data: The top-level value; None for an empty file.
        lines: Line (from 1) of every key and list item. Behind an alias it is the line where the value is written.
    """

    data: Any
    lines: dict[Loc, int]


def parse(text: str, name: str) -> Document:
    """Parse one YAML document.

    Args:
        text: The text.
        name: What to call its place in messages: a file name or an option.

    Raises:
        RecipeError: It is not one well-formed document of plain values.
    """
    loader = None
    try:
        loader = _Loader(text.replace("\r\n", "\n"))
        node = loader.get_single_node()
        if node is None:
            return Document(None, {})
        builder = _Builder(name)
        return Document(builder.value(node, ()), builder.lines)
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, name) from None
    except RecursionError:
        raise RecipeError("nested too deeply", where=name, fix="a recipe has a handful of levels") from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_value(text: str, name: str) -> Any:
    """Parse one value as it would stand in a recipe: a scalar, or a list or mapping in flow style."""
    try:
        return parse(text, name).data
    except RecipeError as error:
        raise RecipeError(error.message, where=name, fix=error.fix) from None


def dump(data: Any) -> str:
    """Write plain values as YAML that `parse` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


@dataclass
class _Builder:
    """Turns nodes into values and notes the lines."""

    name: str
    lines: dict[Loc, int] = field(default_factory=dict)
    open_nodes: set[int] = field(default_factory=set)
    count: int = 0

    def value(self, node: yaml.Node, loc: Loc) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise self.error(node, f"more than {MAX_VALUES} values once aliases are expanded", "write fewer aliases")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if len(loc) > MAX_DEPTH:
            raise self.error(node, "nested too deeply", "a recipe has a handful of levels")
        if id(node) in self.open_nodes:
            raise self.error(node, "an alias stands inside the value it refers to", "write the value out")
        self.open_nodes.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.item(item, (*loc, i)) for i, item in enumerate(node.value)]
            return self.mapping(node, loc)
        finally:
            self.open_nodes.discard(id(node))

    def item(self, node: yaml.Node, loc: Loc) -> Any:
        self.lines[loc] = _line(node)
        return self.value(node, loc)

    def mapping(self, node: yaml.Node, loc: Loc) -> dict[str, Any]:
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error(
                    key, "a key must be a word", "put the value behind `name: `, or quote a text with : or {"
                )
            if key.tag == _TAG + "merge":
                merged = self.merged(value, loc) | merged
                continue
            name = self.text(key)
            if name in own:
                first = _line(own[name][0])
                raise self.error(key, f"key `{name}` is given twice (first in line {first})", "remove one of the two")
            self.check_colon(value, key)
            own[name] = key, value
        for name, (key, value) in own.items():
            if name in merged:
                self.forget((*loc, name))
            self.lines[(*loc, name)] = _line(key)
            merged[name] = self.value(value, (*loc, name))
        return merged

    def check_colon(self, value: yaml.Node, key: yaml.ScalarNode) -> None:
        """`{beta:0.1}` is a key without a value, and `beta:0.1` under a key is a text: neither is ever meant."""
        lone = key if value.value == "" else value if _line(value) > _line(key) else None
        if isinstance(lone, yaml.ScalarNode) and lone.style is None and re.match(r"[A-Za-z_]\w*:\S", lone.value):
            fix = f"write `{lone.value.replace(':', ': ', 1)}`"
            raise self.error(lone, f"no space after the colon in `{lone.value}`", fix)

    def merged(self, node: yaml.Node, loc: Loc) -> dict[str, Any]:
        """What `<<: *alias` brings in; a key of the mapping itself, or of an earlier entry, wins."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(each, yaml.MappingNode) for each in nodes):
            raise self.error(node, "`<<` wants a mapping", "write `<<: *name`, where `&name` marks a mapping")
        result: dict[str, Any] = {}
        for each in reversed(nodes):
            result |= self.value(each, loc)
        return result

    def forget(self, loc: Loc) -> None:
        for known in [known for known in self.lines if known[: len(loc)] == loc]:
            del self.lines[known]

    def scalar(self, node: yaml.ScalarNode) -> Any:
        text, kind = self.text(node), node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            if len(text) > 30:
                raise self.error(node, f"a number of {len(text)} digits", "quote it if it is a name")
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            number = math.inf if text[-1] in "fFnN" else float(text)
            if math.isinf(number):
                raise self.error(
                    node, f"{text} is not a finite number", "write a finite number, or quote it if it is a name"
                )
            return number
        return text

    def text(self, node: yaml.ScalarNode) -> str:
        text = str(node.value)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise self.error(node, "half of a surrogate pair is no character", "write the character itself")
        return text

    def error(self, node: yaml.Node, message: str, fix: str) -> RecipeError:
        return RecipeError(message, where=f"{self.name}:{_line(node)}", fix=fix)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


_NO_SPACE = re.compile(r"\s*(- )?[A-Za-z_]\w*:[^\s:]")
_FIXES = (
    (r"character '\\t'", "indent with spaces, not tabs"),
    (r"found the tag", "remove the tag: a recipe holds plain values; quote a text that starts with !"),
    (r"but found another document", "keep one document: remove the `---` line"),
    (r"quoted scalar", "close the quote"),
    (r"flow (sequence|mapping)", "close the bracket, or put the missing comma"),
    (r"could not find expected ':'", "write `key: value`, with a space after the colon"),
    (r"mapping values are not allowed", "quote a text that holds `: `, or mend the indentation"),
    (r"block (mapping|collection)|block end", "give all keys of one mapping the same indentation"),
    (r"alias|anchor", "mark a value with &name before *name; quote a text that starts with & or *"),
    (r"cannot start any token", "quote a text that starts with this character"),
)


def _syntax_error(error: yaml.YAMLError, text: str, name: str) -> RecipeError:
    """Tell a parser's complaint in the line where the cause stands."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return RecipeError(
            f"the character U+{error.character:04X} is not allowed", where=f"{name}:{line}", fix="remove it"
        )
    assert isinstance(error, yaml.MarkedYAMLError)
    story = f"{error.context or ''} {error.problem or ''}".strip()
    # What is left open is mended where it was opened; everything else where the parser stumbled.
    opened = re.search(r"flow (sequence|mapping)|quoted scalar|simple key", error.context or "")
    mark = (opened and error.context_mark) or error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    if "mapping" in story and line > 1 and _NO_SPACE.match(text.splitlines()[line - 2]):
        return RecipeError("no space after the colon", where=f"{name}:{line - 1}", fix="write `key: value`")
    if (opened_at := _long_quote(text, line)) is not None:
        return RecipeError(f"a quote is closed only in line {line}", where=f"{name}:{opened_at}", fix="close the quote")
    fix = next(
        (fix for pattern, fix in _FIXES if re.search(pattern, story)), "see the line for a missing bracket or quote"
    )
    return RecipeError(f"not valid YAML: {story}", where=f"{name}:{line}", fix=fix)


def _long_quote(text: str, line: int) -> int | None:
    """The line where a quoted text begins that ends in a later line, the one where the parser stumbled."""
    with contextlib.suppress(yaml.YAMLError):
        for token in yaml.scan(text, Loader=_Loader):
            ends = token.end_mark.line + 1
            if (
                isinstance(token, yaml.ScalarToken)
                and token.style in ('"', "'")
                and ends == line > token.start_mark.line + 1
            ):
                return int(token.start_mark.line) + 1
    return None
