"""Another prompt's completion beside each unpaired example: what KTO estimates the distance of two policies by.

Which one an example gets is a function of the data alone, so that it depends on no batch, rank or resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from align.data.chat import Completion, Example
from align.data.report import prompt_group
from align.errors import DataError


def with_mismatched(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """Unpaired examples, each with the completion of the next one whose prompt differs; after the last comes the first.

    It is cut to what the example's own prompt leaves of `max_tokens`.

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
    """For each place the next one, in a circle, of another group; None if there is but one group."""
    count = len(groups)
    following: list[int | None] = [None] * count
    for place in reversed(range(2 * count)):
        i, after = place % count, (place + 1) % count
        following[i] = after if groups[after] != groups[i] else following[after]
    return following


def _cut(completion: Completion, room: int) -> Completion:
    return Completion(completion.ids[:room], completion.mask[:room], completion.truncated or len(completion.ids) > room)
