"""The model card of an artifact: what its manifest knows, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from align.artifacts.manifest import Manifest

LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("adapter"{quantization})
"""
LOAD_MODEL = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model")
"""
QUANTIZATION = {
    "none": "",
    "int8": ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "nf4": ', quantization_config=BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True\n)",
}


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write `README.md`, a Hugging Face model card, beside the weights.

    Args:
        folder: Folder of the artifact.
        manifest: Of a stage that trained a policy.
    """
    assert manifest.policy is not None
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(manifest), sort_keys=False)}---",
        f"# {manifest.stage}",
        _story(manifest),
        "## Load\n\n" + _loading(manifest),
        "## Data\n\n" + _data(manifest.data),
        "## Settings\n\n" + _fenced("yaml", yaml.safe_dump(manifest.settings, sort_keys=False)),
        "## Metrics at the end\n\n" + _table(("metric", "value"), _numbers(manifest.metrics)),
        "## Made from\n\n" + _table(("input", "fingerprint"), manifest.inputs.items()),
        "## Versions and hardware\n\n" + _table(("", ""), {**manifest.versions, **manifest.hardware}.items()),
        "## Licence\n\nNot recorded. The licences of the base model and of every data set apply to these weights.",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front_matter(manifest: Manifest) -> dict[str, Any]:
    policy = manifest.policy
    assert policy is not None
    found: dict[str, Any] = {}
    if policy.base_kind == "hub":
        found["base_model"] = policy.base
    found["library_name"] = "peft" if policy.adapter else "transformers"
    found["pipeline_tag"] = "text-generation"
    quantized = [policy.model.quantization] if policy.model.quantization != "none" else []
    found["tags"] = ["align", manifest.kind, *(["lora"] if policy.adapter else []), *quantized]
    return found


def _story(manifest: Manifest) -> str:
    policy = manifest.policy
    assert policy is not None
    base = {"hub": f"`{policy.base}`", "path": f"the model in `{policy.base}`", "stage": f"stage `{policy.base[:16]}`"}
    what = "A LoRA adapter" if policy.adapter else "A model with all parameters trained"
    on = f" on {base[policy.base_kind]}" if policy.base != manifest.fingerprint else ""
    revision = f" at revision `{policy.revision}`" if policy.revision else ""
    minutes = manifest.wall_seconds / 60
    return (
        f"{what}{on}{revision}, trained by `kind: {manifest.kind}` of the recipe `{manifest.recipe}` with align "
        f"{manifest.versions.get('align', '')}: {manifest.steps} optimizer steps in {minutes:.1f} minutes, "
        f"seed {manifest.seed}, at most {manifest.peak_memory_bytes / 2**30:.2f} GiB of memory, "
        f"finished {manifest.created}. Fingerprint `{manifest.fingerprint}`."
    )


def _loading(manifest: Manifest) -> str:
    policy = manifest.policy
    assert policy is not None
    if not policy.adapter:
        return _fenced("python", LOAD_MODEL)
    quantization = QUANTIZATION[policy.model.quantization]
    needs = "from transformers import BitsAndBytesConfig\n" if quantization else ""
    return _fenced("python", needs + LOAD_ADAPTER.format(quantization=quantization))


def _data(data: Mapping[str, Any]) -> str:
    rows = [(name, key, value) for name, report in data.items() for key, value in _flat(report)]
    return _table(("data", "count", "value"), rows)


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves of nested dicts that are numbers or words, by dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, int | float | str):
        yield prefix, value


def _numbers(metrics: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    return ((name, f"{value:.6g}") for name, value in metrics.items())


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    if not lines:
        return "None."
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines])


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
