"""Ways to break a recipe by one edit, each with the line it breaks and, where there is one, the word that was meant."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

AUTHORS_OWN = ("stages", "data")
"""Mappings whose keys are names that the author chose: no typo can be told from a name."""

CHOICES = (
    "kind", "policy", "reference", "data", "prompts", "baseline", "candidates", "format", "quantization", "dtype",
    "lr_scheduler", "keep", "deepspeed", "generator", "part", "scorers", "reduction", "loss_on", "report_to",
    "policies", "decoding", "engine", "samples", "reward", "missing_eos", "how", "include",
)  # fmt: skip
"""Keys whose text values come from a list of known words."""

LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@dataclass(frozen=True)
class Broken:
    """A broken recipe.

    Attributes:
        how: What was done.
        text: The recipe.
        line: The line (from 1) where the mistake is.
        meant: The word that stood there.
    """

    how: str
    text: str
    line: int
    meant: str | None = None


@dataclass(frozen=True)
class Spot:
    """A scalar of a recipe: its key path, where it stands, and whether it is a key."""

    path: tuple[str, ...]
    node: yaml.ScalarNode
    key: bool

    @property
    def line(self) -> int:
        return int(self.node.start_mark.line) + 1


def spots(text: str) -> list[Spot]:
    """All scalars of a recipe, each once, aliases left out."""
    seen: set[int] = set()

    def walk(node: yaml.Node, path: tuple[str, ...]) -> Iterator[Spot]:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield Spot(path, node, key=False)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from walk(item, path)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield Spot((*path, key.value), key, key=True)
                yield from walk(value, (*path, key.value))

    return list(walk(yaml.compose(text, Loader=yaml.SafeLoader), ()))


def replaced(text: str, node: yaml.Node, new: str) -> str:
    return text[: node.start_mark.index] + new + text[node.end_mark.index :]


def slips(word: str) -> Iterator[tuple[str, str]]:
    """Every single-letter slip: a letter left out, two swapped, one doubled or added, one replaced."""
    for i in range(len(word)):
        yield "left out", word[:i] + word[i + 1 :]
        for letter in LETTERS:
            yield "added", word[:i] + letter + word[i:]
            yield "replaced", word[:i] + letter + word[i + 1 :]
        if i + 1 < len(word):
            yield "swapped", word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def one_slip(word: str, rng: random.Random) -> tuple[str, str]:
    """One slip of the four kinds, each as likely."""
    kind = rng.choice(["left out", "added", "replaced"] + ["swapped"] * (len(set(word)) > 1))
    return rng.choice([(how, each) for how, each in slips(word) if how == kind and each != word])


def key_typos(text: str, rng: random.Random, known: set[str]) -> Iterator[Broken]:
    """One slip in every key that is not the author's own; `known` words are no slips."""
    for spot in spots(text):
        if not spot.key or spot.path[:-1] in [(each,) for each in AUTHORS_OWN] or spot.node.value == "<<":
            continue
        how, word = one_slip(spot.node.value, rng)
        if word and word not in known:
            path = ".".join(spot.path)
            yield Broken(f"key {path} -> {word} ({how})", replaced(text, spot.node, word), spot.line, spot.node.value)


def value_typos(text: str, rng: random.Random, known: set[str]) -> Iterator[Broken]:
    """One slip in every kind, choice and reference."""
    for spot in spots(text):
        if spot.key or not spot.path or spot.path[-1] not in CHOICES or spot.node.value in ("", "null"):
            continue
        how, word = one_slip(spot.node.value, rng)
        if word and word not in known and not word.startswith(("-", "_")):
            path = ".".join(spot.path)
            yield Broken(
                f"value of {path} -> {word} ({how})", replaced(text, spot.node, word), spot.line, spot.node.value
            )


SIGNED = ("weights", "threshold")
"""Numbers that may be negative."""

WRONG = {
    "int": ("abc", "[1]", "{a: 1}", "true", '"7"', "-1"),
    "float": ("abc", "[1]", "{a: 1}", "true", "-1"),
    "bool": ("yes", "1", "[]"),
}


def wrong_types(text: str, rng: random.Random) -> Iterator[Broken]:
    """A value of another type, or out of range, for every number and switch; a scalar for every mapping."""
    for spot in spots(text):
        value = spot.node.value
        kind = "bool" if value in ("true", "false") else "int" if re.fullmatch("[0-9]+", value) else "float"
        if spot.key or (kind == "float" and not re.fullmatch(r"[0-9]*\.?[0-9]*([eE]-?[0-9]+)?", value)) or not value:
            continue
        wrong = rng.choice([each for each in WRONG[kind] if each != "-1" or not set(SIGNED) & set(spot.path)])
        if "options" not in spot.path:
            yield Broken(f"{'.'.join(spot.path)}: {wrong}", replaced(text, spot.node, wrong), spot.line)
    for name in ("model", "data", "stages", "launch", "logging"):
        if match := re.search(rf"^{name}:.*\n((?:[ #].*\n|\n)*)", text, flags=re.M):
            line = text.count("\n", 0, match.start()) + 1
            broken = text[: match.start()] + f"{name}: 3\n" + text[match.end() :]
            yield Broken(f"{name}: 3", broken, line)


def yaml_tricks(text: str, rng: random.Random) -> Iterator[Broken]:
    """What is no recipe, whatever it says: a second value of a key, tabs, what is left open, tags, two documents."""
    lines = text.splitlines(keepends=True)

    def edited(i: int, new: str) -> str:
        return "".join([*lines[:i], new, *lines[i + 1 :]])

    for i, line in enumerate(lines):
        body = line.split(" #")[0].rstrip()
        if not body or body.lstrip().startswith("#"):
            continue
        if re.match(r"\s*[\w-]+: [^&{\[]", line) and (i + 1 == len(lines) or not lines[i + 1].startswith(" " * 20)):
            yield Broken("a line twice", edited(i, line + line), i + 2)
            yield Broken("a tag", edited(i, line.replace(": ", ": !!python/name:os.system ", 1)), i + 1)
            yield Broken("an unknown alias", edited(i, re.sub(r": .*", ": *nowhere", line, count=1)), i + 1)
            yield Broken("an open quote", edited(i, line.replace(": ", ": '", 1)), i + 1)
            yield Broken("an open double quote", edited(i, line.replace(": ", ': "', 1)), i + 1)
        if line.startswith("  "):
            yield Broken("a tab", edited(i, "\t" + line[2:]), i + 1)
        if body.endswith(("}", "]")) and body.count("{") + body.count("[") == body.count("}") + body.count("]"):
            yield Broken("an open bracket", edited(i, body[:-1] + "\n"), i + 1)
            yield Broken("a wrong bracket", edited(i, body[:-1] + {"}": "]", "]": "}"}[body[-1]] + "\n"), i + 1)
        if re.match(r"\w+:", line) and any(re.match(r"\w", earlier) for earlier in lines[:i]):
            yield Broken("two documents", edited(i, "---\n" + line), i + 1)
        if re.match(r"\s*[a-z_]+: \w", line) and "{" not in line:
            yield Broken("no space", edited(i, line.replace(": ", ":", 1)), i + 1)
        if rng.random() < 0.2:
            yield Broken("a control character", edited(i, line.rstrip("\n") + "\x01\n"), i + 1)
    layers = "".join(f"    - &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 9))
    yield Broken("a bomb", text + "bomb:\n    - &b0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + layers, 0)
    yield Broken("a deep nest", text + f"deep: {'[' * 300}\n", 0)
