"""What a prompt of the film-review world asks for, written as text and read back from it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from align.errors import DataError
from align.quickstart.lexicon import FEATURES, TITLE_ADJECTIVES, TITLE_NOUNS, TONES

TEMPLATES: Final = (
    "Write a {tone} review of {title}. Mention {features}.",
    "Please review {title} in a {tone} tone. Talk about {features}.",
    "I need a {tone} review of {title} that covers {features}.",
)
MAX_FEATURES: Final = 3
HELDOUT_ONE_IN: Final = 10

_TITLE = re.compile(rf"\bthe (?:{'|'.join(TITLE_ADJECTIVES)}) (?:{'|'.join(TITLE_NOUNS)})\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z']+")


@dataclass(frozen=True)
class Task:
    """A film, the wanted tone (``positive`` or ``negative``) and the features to mention."""

    title: str
    tone: str
    features: tuple[str, ...]

    def is_heldout(self) -> bool:
        """Whether this combination is kept for evaluation: a fixed tenth of all, by digest, whatever the seed."""
        key = "|".join((self.title, self.tone, *sorted(self.features)))
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELDOUT_ONE_IN == 0


def titles_in(text: str) -> set[str]:
    """The films that a text names, in lower case."""
    return {match.lower() for match in _TITLE.findall(text)}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def render(task: Task, template: str) -> str:
    """The prompt that asks for `task`, features in the order given."""
    names = [f"the {feature}" for feature in task.features]
    listing = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return template.format(tone=task.tone, title=task.title, features=listing)


def parse(prompt: str) -> Task:
    """Reads the task back from a prompt; any wording will do that names one film, one tone and some features.

    Raises:
        DataError: The prompt does not ask for a film review of this world.
    """
    words = words_of(prompt)
    titles = titles_in(prompt)
    tones = {word for word in words if word in TONES}
    features = tuple(dict.fromkeys(word for word in words if word in FEATURES))
    if len(titles) != 1 or len(tones) != 1 or not features:
        raise DataError(
            f"no film review is asked for in the prompt {prompt!r}",
            fix="name one film of the world, one tone (positive or negative) and at least one of its features: "
            + ", ".join(FEATURES),
        )
    return Task(title=titles.pop().title(), tone=tones.pop(), features=features)
