"""The model card of an artifact: what its manifest knows, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from align.models.rewards import read_normalization

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
LOAD_REWARD_ADAPTER = """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("adapter")
config = {{"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}}
model = AutoPeftModelForSequenceClassification.from_pretrained("adapter", **config{quantization})
"""
LOAD_REWARD_MODEL = """\
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("model")
"""
SCORING = """\
A prompt and its completion, as the chat template writes them and up to and including EOS, give one number: \
`model(**batch).logits[:, 0]`, higher is better. transformers scores the last token that is not padding, so the pad \
token has to be another than EOS."""
NORMALIZED = """\
Where align itself uses this model, the reward becomes (r {sign} {mean:.6g}) / {std:.6g}: mean 0 and standard \
deviation 1 over {n} completions ({on}), see `normalization.json`."""
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
        manifest: Of a stage that trained a policy or a reward model.
    """
    assert manifest.trained is not None
    scored = [f"## Score\n\n{_scoring(folder)}"] if manifest.reward else []
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(manifest), sort_keys=False)}---",
        f"# {manifest.stage}",
        _story(manifest),
        "## Load\n\n" + _loading(manifest),
        *scored,
        "## Data\n\n" + _data(manifest.data),
        "## Settings\n\n" + _fenced("yaml", yaml.safe_dump(manifest.settings, sort_keys=False)),
        "## Metrics at the end\n\n" + _table(("metric", "value"), _numbers(manifest.metrics)),
        "## Made from\n\n" + _table(("input", "fingerprint"), manifest.inputs.items()),
        "## Versions and hardware\n\n" + _table(("", ""), {**manifest.versions, **manifest.hardware}.items()),
        "## Licence\n\nNot recorded. The licences of the base model and of every data set apply to these weights.",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front_matter(manifest: Manifest) -> dict[str, Any]:
    model = manifest.trained
    assert model is not None
    found: dict[str, Any] = {}
    if model.base_kind == "hub":
        found["base_model"] = model.base
    found["library_name"] = "peft" if model.adapter else "transformers"
    found["pipeline_tag"] = "text-classification" if manifest.reward else "text-generation"
    tags = ["reward-model"] if manifest.reward else []
    quantized = [model.model.quantization] if model.model.quantization != "none" else []
    found["tags"] = ["align", manifest.kind, *tags, *(["lora"] if model.adapter else []), *quantized]
    return found


def _story(manifest: Manifest) -> str:
    model = manifest.trained
    assert model is not None
    base = {"hub": f"`{model.base}`", "path": f"the model in `{model.base}`", "stage": f"stage `{model.base[:16]}`"}
    what = "A LoRA adapter" if model.adapter else "A model with all parameters trained"
    if manifest.reward:
        what = "A reward model: " + ("a LoRA adapter" if model.adapter else "all parameters") + " and a scalar head"
    on = f" on {base[model.base_kind]}" if model.base != manifest.fingerprint else ""
    revision = f" at revision `{model.revision}`" if model.revision else ""
    minutes = manifest.wall_seconds / 60
    return (
        f"{what}{on}{revision}, trained by `kind: {manifest.kind}` of the recipe `{manifest.recipe}` with align "
        f"{manifest.versions.get('align', '')}: {manifest.steps} optimizer steps in {minutes:.1f} minutes, "
        f"seed {manifest.seed}, at most {manifest.peak_memory_bytes / 2**30:.2f} GiB of memory, "
        f"finished {manifest.created}. Fingerprint `{manifest.fingerprint}`."
    )


def _loading(manifest: Manifest) -> str:
    model = manifest.trained
    assert model is not None
    if not model.adapter:
        return _fenced("python", LOAD_REWARD_MODEL if manifest.reward else LOAD_MODEL)
    quantization = QUANTIZATION[model.model.quantization]
    needs = "from transformers import BitsAndBytesConfig\n" if quantization else ""
    snippet = LOAD_REWARD_ADAPTER if manifest.reward else LOAD_ADAPTER
    return _fenced("python", needs + snippet.format(quantization=quantization))


def _scoring(folder: Path) -> str:
    """How to use a reward model, and the scale of its rewards."""
    found = read_normalization(folder)
    if not found.n:
        return SCORING
    sign = "-" if found.mean >= 0 else "+"
    scale = NORMALIZED.format(sign=sign, mean=abs(found.mean), std=found.std, n=found.n, on=found.on)
    return f"{SCORING} {scale}"


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
