"""One offline HTML page about a run: no script, no request, everything inline."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from align.artifacts.seal import write_atomic
from align.report import numbers, verdict
from align.report.charts import comparison_figures, single_values, training_figures
from align.report.graph import graph_plot
from align.report.read import Json, RunFiles, StageFiles, read_run
from align.report.records import makes_records, record_values, selection_rows, shown_records
from align.report.remarks import lengths, remarks
from align.report.rewards import reward_figures, reward_values
from align.spec.stages import CompareStage

_YAML_LINE = re.compile(r"^(?P<indent>\s*(?:- )?)(?P<key>[\w.-]+:)?(?P<value>.*?)(?P<comment>(?:^|\s)#.*)?$")


def write_report(run_folder: Path, out: Path) -> Path:
    """Write the report of a run from the files its stages left; stages that are missing are told as missing.

    Args:
        run_folder: `runs/<recipe>/`.
        out: The page; replaced atomically.

    Returns:
        `out`.

    Raises:
        ArtifactError: There is no such folder.
    """
    run = read_run(run_folder)
    write_atomic(out, render(run))
    return out


def render(run: RunFiles) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("align.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=numbers.count, short=numbers.short, duration=numbers.duration, size=numbers.size, heading=numbers.heading
    )
    style = environment.get_template("style.css").render()
    # A browser must find exactly the bytes that were hashed between the tags; nothing else may style the page.
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        run=run,
        style=style,
        policy=f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'",
        facts=_facts(run),
        graph=graph_plot(run) if run.stages else "",
        comparisons=[_comparison(run, stage) for stage in run.stages.values() if stage.results],
        made=[_made(run, stage) for stage in run.stages.values() if makes_records(stage.kind)],
        stages=[
            _stage(run, stage) for stage in run.stages.values() if not stage.results and not makes_records(stage.kind)
        ],
        data=[row for stage in run.stages.values() for row in _data(stage)],
        recipe_lines=list(_yaml_tokens(run.recipe_text)),
        manifests=[stage.manifest for stage in run.stages.values() if stage.manifest],
        versions=_values(run, "versions"),
        hardware=_values(run, "hardware"),
    )


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """The head of the page: name and value."""
    made = [stage.manifest for stage in run.stages.values() if stage.manifest]
    facts = [("Stages finished", f"{len(made)} of {len(run.stages)}")]
    if made:
        facts += [
            ("Wall time", numbers.duration(sum(m.wall_seconds for m in made))),
            ("Peak memory", numbers.size(max(m.peak_memory_bytes for m in made))),
            ("Last stage made", max(m.created for m in made).replace("T", " ").replace("+00:00", " UTC")),
        ]
    return facts


def _anchor(run: RunFiles, stage: StageFiles) -> str:
    return f"stage-{list(run.stages).index(stage.name)}"


def _comparison(run: RunFiles, stage: StageFiles) -> Json:
    results = stage.results
    assert results is not None
    metrics = numbers.metrics_of(results)
    shown = stage.samples[: _shown(stage)]
    return {
        "stage": stage,
        "anchor": _anchor(run, stage),
        "finding": verdict.finding(results),
        "figures": comparison_figures(results),
        "headings": [numbers.metric_heading(metric) for metric in metrics],
        "rows": [(name, [_cell(results, name, metric) for metric in metrics]) for name in results["candidates"]],
        "baseline": results.get("baseline"),
        "n": results.get("n"),
        "confidence": verdict.percent(results),
        "legend": verdict.legend(results) if len(results["candidates"]) > 1 else "",
        "prompts": len(stage.samples),
        "samples": [{**sample, "answers": _answers(sample)} for sample in shown],
    }


def _cell(results: Json, candidate: str, metric: str) -> Json | None:
    interval = numbers.as_interval(results["candidates"][candidate].get(metric))
    if interval is None or verdict.is_by_definition(results, candidate, metric):
        return None
    places, sign = numbers.column_decimals(results, metric), verdict.direction(results, candidate, metric)
    return {
        "mean": numbers.fixed(interval.mean, places),
        "span": numbers.span(interval, places),
        "mark": verdict.MARKS[sign],
    }


def _shown(stage: StageFiles) -> int:
    try:
        return CompareStage.model_validate(stage.settings).show
    except ValidationError:  # the folder has no recipe, or one of another version
        return int(CompareStage.model_fields["show"].default)


def _answers(sample: Json) -> list[Json]:
    """The answers to one prompt, each with its figures as text."""
    told = []
    for name, answer in sample["answers"].items():
        scores = answer.get("scores", {}).items()
        figures = [f"{label} {numbers.fixed(v, 2) if math.isfinite(v) else 'not finite'}" for label, v in scores]
        if "length" in answer:
            figures.append(f"{answer['length']} tokens" + ("" if answer.get("ended", True) else ", cut off"))
        told.append({"candidate": name, "text": answer.get("text", ""), "figures": figures})
    return told


def _stage(run: RunFiles, stage: StageFiles) -> Json:
    made = stage.manifest
    facts: list[tuple[str, str]] = []
    if made:
        examples = [report["examples"] for report in stage.data.values() if "examples" in report]
        facts = [
            ("Steps", numbers.count(made.steps)),
            *([("Examples", numbers.count(sum(examples)))] if examples else []),
            ("Wall time", numbers.duration(made.wall_seconds)),
            ("Peak memory", numbers.size(made.peak_memory_bytes)),
            *([("Seed", str(made.seed))] if made.seed is not None else []),
        ]
    facts += reward_values(stage.evaluation, stage.normalization)
    facts += single_values(stage.metrics)
    return {
        "stage": stage,
        "anchor": _anchor(run, stage),
        "facts": facts,
        "figures": reward_figures(stage.evaluation) + training_figures(stage.metrics),
        "policy": _policy(run, stage),
        "drawn": _drawn(stage),
    }


def _drawn(stage: StageFiles) -> list[Json]:
    """What the policy of a stage on rollouts wrote at its start, half way and at its end."""
    lines = stage.drawn
    picked = {id(line): line for line in (lines[:1] + lines[len(lines) // 2 :][:1] + lines[-1:])}
    return [
        {
            "prompt": str(line.get("prompt", "")),
            "answers": [
                {
                    "candidate": f"rollout {int(line.get('rollout', 0)) + 1}",
                    "text": line["completion"],
                    "figures": [f"score {numbers.fixed(float(line.get('score', math.nan)), 2)}"],
                }
            ],
        }
        for line in picked.values()
    ]


def _made(run: RunFiles, stage: StageFiles) -> Json:
    made = stage.manifest
    values = record_values(made.metrics) if made else []
    took = [("Wall time", numbers.duration(made.wall_seconds))] if made else []
    return {
        "stage": stage,
        "anchor": _anchor(run, stage),
        "facts": [*values, *took],
        "selection": selection_rows(stage.selection),
        "samples": shown_records(stage.records),
    }


def _policy(run: RunFiles, stage: StageFiles) -> str:
    """What the stage's policy, or reward model, is made of, in words."""
    record = stage.manifest.trained if stage.manifest else None
    if record is None:
        return ""
    head = " and a scalar head" if stage.manifest and stage.manifest.reward else ""
    if not record.adapter:
        return "every parameter trained" + (", a scalar head too" if head else "")
    names = {s.manifest.fingerprint: name for name, s in run.stages.items() if s.manifest}
    base = names.get(record.base, record.base)
    lora = record.model.adapter
    rank = "" if lora == "none" else f" of rank {lora.rank}"
    quantization = "" if record.model.quantization == "none" else f", {record.model.quantization}"
    return f"LoRA adapter{rank}{head} on {base}{quantization}"


def _data(stage: StageFiles) -> Iterator[Json]:
    for name, report in stage.data.items():
        yield {
            "stage": stage.name,
            "name": name,
            "numbers": [numbers.count(report.get(key)) for key in ("rows_read", "examples", "truncated")],
            "remarks": remarks(report),
            "lengths": lengths(report),
        }


def _values(run: RunFiles, field: str) -> list[tuple[str, str]]:
    """Versions or hardware over all stages; a value that is not the same everywhere is told with its stages."""
    seen: dict[str, dict[str, list[str]]] = {}
    for stage in run.stages.values():
        for key, value in (getattr(stage.manifest, field) if stage.manifest else {}).items():
            text = (
                numbers.size(value)
                if key.endswith("_bytes")
                else ", ".join(value)
                if isinstance(value, list)
                else value
            )
            seen.setdefault(key.removesuffix("_bytes"), {}).setdefault(str(text), []).append(stage.name)
    told = []
    for key, values in seen.items():
        one = len(values) == 1
        told.append(
            (key, next(iter(values)) if one else "; ".join(f"{v} ({', '.join(at)})" for v, at in values.items()))
        )
    return told


def _yaml_tokens(text: str) -> Iterator[list[tuple[str, str]]]:
    """Lines of YAML as (class, text) pieces: keys and comments are set apart."""
    for line in text.splitlines():
        match = _YAML_LINE.match(line)
        yield [(kind, part) for kind, part in match.groupdict().items() if part] if match else [("value", line)]
