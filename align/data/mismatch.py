"""Another prompt's completion beside each unpaired example: what KTO estimates the distance of two policies by.

Which one an example gets is a function of the data alone, so that it depends on no batch, rank or resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from align.data.chat import Completion, Example
from align.data.report import prompt_group
from align.errors import DataError


def with_mismatched(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """Unpaired examples, each with a completion of the next prompt; after the last comes the first.

    The j-th example of a prompt takes the j-th of the next, so that desirable and undesirable completions are met as
    often as the data has them, also where each prompt has its desirable one first. What is taken is cut to what the
    example's own prompt leaves of `max_tokens`.

    Raises:
        DataError: All prompts are equal.
    """
    following = _next_of_another([prompt_group(example) for example in examples])
    made = []
    for example, other in zip(examples, following, strict=True):
        if other is None:
            raise DataError(
                f"all {len(examples)} examples have one prompt, and each needs a completion of another",
                fix="give data of several prompts",
            )
        room = max_tokens - len(example.prompt_ids)
        made.append(replace(example, completions=(*example.completions, _cut(examples[other].completions[0], room))))
    return made


def _next_of_another(groups: Sequence[bytes]) -> list[int | None]:
    """For each place one of the next run, in a circle, of another group; None if there is but one group."""
    runs = [list(run) for _, run in groupby(range(len(groups)), key=groups.__getitem__)]
    if len(runs) > 1 and groups[runs[0][0]] == groups[runs[-1][0]]:
        runs[0] = [*runs.pop(), *runs[0]]  # the circle closes inside a run
    following: list[int | None] = [None] * len(groups)
    if len(runs) > 1:
        for run, after in zip(runs, [*runs[1:], runs[0]], strict=True):
            for j, i in enumerate(run):
                following[i] = after[j % len(after)]
    return following


def _cut(completion: Completion, room: int) -> Completion:
    return Completion(completion.ids[:room], completion.mask[:room], completion.truncated or len(completion.ids) > room)
