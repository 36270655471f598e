"""Writes the pages of methods and other kinds from their docstrings and settings: `python docs/generate.py`."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from align.methods import Method, all_methods
from align.recipe.shape import strip
from align.spec.kinds import OTHER_KINDS
from align.spec.online import RolloutStage
from align.spec.stages import GenerationSettings, PolicyStage, Stage, TrainedStage

PAGES = Path(__file__).parent / "methods"
KIND_PAGES = Path(__file__).parent / "kinds"


def page(method: Method) -> str:
    """One method as Markdown: what it is, its equation and source, its settings."""
    module = sys.modules[method.loss.__module__]
    title, _, rest = (module.__doc__ or "").strip().partition("\n")
    bases = {*PolicyStage.model_fields, *TrainedStage.model_fields}
    if issubclass(method.config, RolloutStage):
        bases |= {n for n in RolloutStage.model_fields if n not in vars(method.config).get("__annotations__", {})}
    own = [n for n in method.config.model_fields if n not in bases]
    shared = [n for n in method.config.model_fields if n not in own]
    lines = [
        f"# `{method.kind}`",
        "",
        title,
        "",
        _prose(rest),
        "",
        f"Batch: {method.batch.value}. Reference: {'yes' if method.reference else 'no'}. Source: {method.source}.",
        "",
        "## Settings of its own",
        "",
        *_table(method.config, [n for n in own if n != "kind"]),
        "",
        "## Settings shared with other methods",
        "",
        *_table(method.config, shared),
        "",
        *_advantages(method),
        "## Loss",
        "",
        "```text",
        inspect.getdoc(method.loss) or "",
        "```",
        "",
    ]
    return "\n".join(lines)


def _advantages(method: Method) -> list[str]:
    """What a method makes of a rollout."""
    if method.advantages is None:
        return []
    return ["## Advantages", "", "```text", inspect.getdoc(method.advantages) or "", "```", ""]


def _prose(text: str) -> str:
    """A module docstring's body: indented lines are equations."""
    out = []
    for line in text.strip("\n").split("\n"):
        out.append(f"    {line.strip()}" if line.startswith("    ") else line)
    return "\n".join(out).strip("\n")


def _table(config: type[BaseModel], names: list[str]) -> list[str]:
    rows = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name in names:
        field = config.model_fields[name]
        rows.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_cell(field.description)} |")
    return rows


def _type(annotation: Any) -> str:
    if get_origin(annotation) is list:
        annotation = list[strip(get_args(annotation)[0])]
    text = inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:align|typing|annotated_types)(?:\.\w+)*\.(\w+)", r"\1", text)
    text = re.sub(r"Annotated\[(\w+), [^\]]*\]", r"\1", text)
    text = re.sub(r"Optional\[([^\[\]]*)\]", r"\1 | None", text)
    text = re.sub(r"Union\[([^\]]*)\]", lambda m: m[1].replace(", ", " | "), text)
    return f"`{_cell(text)}`"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "its own defaults" if isinstance(default, BaseModel) else f"`{default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def pages() -> dict[str, str]:
    """File name -> content, for every method of this package."""
    own = {k: m for k, m in all_methods().items() if m.loss.__module__.startswith("align.")}
    index = ["# Methods", "", "| kind | batch | reference | what it is |", "| --- | --- | --- | --- |"]
    index += [
        f"| [`{k}`]({k}.md) | {m.batch.value} | {'yes' if m.reference else 'no'} | {_cell(m.summary)} |"
        for k, m in own.items()
    ]
    return {f"{k}.md": page(m) for k, m in own.items()} | {"README.md": "\n".join([*index, ""])}


def kind_page(kind: str, config: type[Stage]) -> str:
    """One kind that does not train: what it does, its settings, and those of its generation."""
    lines = [
        f"# `{kind}`",
        "",
        _cell(inspect.getdoc(config)),
        "",
        f"Produces: {config.produces}. Does not train.",
        "",
        "## Settings",
        "",
        *_table(config, [n for n in config.model_fields if n != "kind"]),
        "",
    ]
    if "generation" in config.model_fields:
        lines += ["## `generation`", "", *_table(GenerationSettings, list(GenerationSettings.model_fields)), ""]
    return "\n".join(lines)


def kind_pages() -> dict[str, str]:
    """File name -> content, for every kind that does not train."""
    index = ["# Kinds that do not train", "", "| kind | produces | what it does |", "| --- | --- | --- |"]
    index += [f"| [`{k}`]({k}.md) | {c.produces} | {_cell(inspect.getdoc(c))} |" for k, c in OTHER_KINDS.items()]
    return {f"{k}.md": kind_page(k, c) for k, c in OTHER_KINDS.items()} | {"README.md": "\n".join([*index, ""])}


if __name__ == "__main__":
    for folder, written in ((PAGES, pages()), (KIND_PAGES, kind_pages())):
        folder.mkdir(exist_ok=True)
        for name, content in written.items():
            (folder / name).write_text(content)
