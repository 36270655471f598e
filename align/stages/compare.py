"""Executes `compare`: every candidate answers the same held-out prompts, and is scored and measured on its answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.artifacts.store import Store
from align.data import Completion, Example, PromptExample, load_prompts
from align.errors import RecipeError
from align.evaluation.metrics import Measured, compare_candidates
from align.logps import completion_logps
from align.models.policies import load_policies, load_policy_tokenizer
from align.models.roles import RoleModel
from align.models.tokenizer import end_ids
from align.rollout import generate
from align.scoring import Scorer, get_scorer, labels, score_completion
from align.spec.job import Job
from align.spec.stages import CompareStage, GenerationSettings
from align.stages.publish import manifest_of

LOGPS_TOKENS = 8192
"""Token budget of one forward pass."""

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Answers:
    """What one candidate said to the prompts, in their order.

    Attributes:
        ids: Token ids of the completions, EOS included where one was drawn.
        texts: The same without special tokens, as scorers see them.
        ended: Whether each ended by itself.
    """

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]


def run(job: Job, settings: CompareStage, store: Store, report: Report) -> None:
    """Compare finished policies and put the comparison into the store.

    Args:
        job: The resolved stage.
        settings: Its settings, parsed.
        store: Where the candidates are read and the artifact is added.
        report: Called with (work done, work in all, what is being done).

    Raises:
        RecipeError: The candidates do not share a tokenizer, or prompts and answers do not fit into the model.
        DataError: The prompts cannot be read, or a scorer cannot use the row of one.
        TrainingError: A scorer returned something that is no score.
    """
    began = time.monotonic()
    report(0, 0, "reading prompts")
    scorers = _scorers(settings)
    tokenizer = _shared_tokenizer(job, settings, store)
    models = load_policies(store, {name: job.inputs[name] for name in settings.candidates})
    prompts, data_report = load_prompts(
        job.data[settings.prompts],
        tokenizer=tokenizer,
        max_tokens=_room(models, settings.generation),
        folder=Path(job.folder),
        quarantine=Path(job.work) / "quarantine.jsonl",
    )
    bench = _Bench(models, settings, tokenizer, scorers, prompts, report)
    answers, measured = {}, {}
    for name in settings.candidates:
        answers[name], measured[name] = bench.measure(name)
    results = compare_candidates(
        measured, baseline=settings.baseline, confidence=settings.confidence, resamples=settings.resamples
    )
    folder = store.temporary(job.fingerprint)
    data = {settings.prompts: data_report.model_dump(mode="json")}
    _write_json(folder / "results.json", results | {"scorers": settings.scorers})
    _write_json(folder / "data.json", data)
    _write_lines(folder / "samples.jsonl", _samples(prompts, answers, measured))
    _write_lines(folder / "scores.jsonl", _score_rows(prompts, measured))
    means = {
        f"{name}/{metric}": interval["mean"]
        for name, own in results["candidates"].items()
        for metric, interval in own.items()
    }
    seconds = time.monotonic() - began
    store.add(manifest_of(job, data=data, metrics=means, seed=settings.generation.seed, seconds=seconds), folder)


class _Bench:
    """The prompts, the models and the scorers that every candidate meets."""

    def __init__(
        self,
        models: Mapping[str, RoleModel],
        settings: CompareStage,
        tokenizer: Any,
        scorers: Mapping[str, tuple[str, Scorer]],
        prompts: Sequence[PromptExample],
        report: Report,
    ) -> None:
        self.models, self.settings, self.tokenizer, self.scorers = models, settings, tokenizer, scorers
        self.prompts, self.report = prompts, report
        self.ends = end_ids(tokenizer)
        generation = settings.generation
        # The KL is an expectation over what the policy itself draws: answers drawn colder say nothing of it.
        plain = generation.model_copy(update={"temperature": 1.0, "top_p": 1.0, "top_k": None, "stop": []})
        self.plain = None if plain == generation else plain
        passes = 2 if self.plain is None else 3
        self.total, self.done = passes * len(settings.candidates), 0

    def measure(self, name: str) -> tuple[Answers, Measured]:
        """Let one candidate answer, and measure its answers."""
        answers = self._answers(name, self.settings.generation)
        drawn = answers
        if self.plain is not None:
            drawn = self._answers(name, self.plain)
        measured = Measured(
            scores={label: self._scores(*scorer, answers.texts) for label, scorer in self.scorers.items()},
            kl=self._kl(name, drawn.ids),
            length=[len(ids) for ids in answers.ids],
            ended=answers.ended,
        )
        self._tell(f"{name} measured", 1)
        return answers, measured

    def _answers(self, name: str, generation: GenerationSettings) -> Answers:
        self._tell(f"{name} answers {len(self.prompts)} prompts", 0)
        ids = generate(self.models[name], name, [p.prompt_ids for p in self.prompts], generation, self.tokenizer)
        self._tell(f"{name} answered", 1)
        texts = [self.tokenizer.decode(own, skip_special_tokens=True) for own in ids]
        return Answers(ids, texts, [bool(own) and own[-1] in self.ends for own in ids])

    def _kl(self, name: str, completions: Sequence[list[int]]) -> list[float]:
        """log p_candidate - log p_baseline of the candidate's own completions: the k1 estimator of the KL, in nats."""
        baseline = self.settings.baseline
        if name == baseline:
            return [0.0] * len(completions)
        examples = [
            Example(prompt.row, prompt.prompt_ids, (Completion(ids, [True] * len(ids), False),), 1.0)
            for prompt, ids in zip(self.prompts, completions, strict=True)
        ]
        own = completion_logps(self.models[name], name, examples, LOGPS_TOKENS)
        other = completion_logps(self.models[baseline], baseline, examples, LOGPS_TOKENS)
        return [ours - theirs for (ours,), (theirs,) in zip(own, other, strict=True)]

    def _scores(self, name: str, scorer: Scorer, texts: Sequence[str]) -> list[float]:
        return [
            score_completion(name, scorer, prompt.text, text, prompt.fields, prompt.row)
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]

    def _tell(self, message: str, step: int) -> None:
        self.done += step
        self.report(self.done, self.total, message)


def _scorers(settings: CompareStage) -> dict[str, tuple[str, Scorer]]:
    """Label -> name and scorer."""
    found = {name: get_scorer(name) for name in settings.scorers}
    return {label: (name, found[name]) for name, label in labels(found).items()}


def _shared_tokenizer(job: Job, settings: CompareStage, store: Store) -> Any:
    """The baseline's tokenizer, after proof that every candidate splits text as it does."""
    shared = load_policy_tokenizer(store, job.inputs[settings.baseline])
    for name in settings.candidates:
        other = load_policy_tokenizer(store, job.inputs[name])
        if other.get_vocab() != shared.get_vocab() or other.chat_template != shared.chat_template:
            raise RecipeError(
                f"`{name}` and the baseline `{settings.baseline}` have different tokenizers or chat templates",
                where=f"stages.{job.stage}.candidates",
                fix="compare policies on one base: log-probabilities of other tokens cannot be compared",
            )
    return shared


def _room(models: Mapping[str, RoleModel], generation: GenerationSettings) -> int:
    """Longest prompt that leaves room for an answer in every model's positions."""
    configs = (roles.config.get_text_config() for roles in models.values())
    positions = min(getattr(config, "max_position_embeddings", None) or 2**20 for config in configs)
    if positions <= generation.max_new_tokens:
        raise RecipeError(
            f"{generation.max_new_tokens} new tokens leave no room for a prompt in the model's {positions} positions",
            where="generation.max_new_tokens",
            fix=f"set it well below {positions}",
        )
    return positions - generation.max_new_tokens


def _samples(
    prompts: Sequence[PromptExample], answers: Mapping[str, Answers], measured: Mapping[str, Measured]
) -> Iterable[dict[str, Any]]:
    for i, prompt in enumerate(prompts):
        told = {
            name: {
                "text": own.texts[i],
                "scores": {label: scores[i] for label, scores in measured[name].scores.items()},
                "length": len(own.ids[i]),
                "ended": own.ended[i],
            }
            for name, own in answers.items()
        }
        yield {"row": prompt.row, "prompt": prompt.text, "answers": told}


def _score_rows(prompts: Sequence[PromptExample], measured: Mapping[str, Measured]) -> Iterable[dict[str, Any]]:
    columns = {name: own.columns() for name, own in measured.items()}
    for i, prompt in enumerate(prompts):
        yield {"row": prompt.row} | {
            name: {metric: values[i] for metric, values in own.items()} for name, own in columns.items()
        }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
