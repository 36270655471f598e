"""The words of the film-review world, shared by its writers and by its gold reward."""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TITLE_ADJECTIVES: Final = _words(
    "Silent Golden Broken Hidden Crimson Distant Frozen Gentle Hollow Lonely Secret Burning"
)
TITLE_NOUNS: Final = _words("Harbor Garden Mirror River Castle Island Forest Bridge Winter Kingdom Letter Tower")
TITLES: Final = tuple(f"The {adjective} {noun}" for adjective in TITLE_ADJECTIVES for noun in TITLE_NOUNS)

FEATURES: Final = _words("acting music plot dialogue pacing ending scenery lighting humor editing")

TONES: Final = {"positive": 1, "negative": -1}

PRAISE: Final = _words(
    "superb brilliant wonderful charming delightful moving graceful clever gripping beautiful great lovely"
)
BLAME: Final = _words("boring dull awful clumsy tedious weak terrible messy shallow lifeless poor bland")
PRAISE_VERBS: Final = _words("loved enjoyed admired")
BLAME_VERBS: Final = _words("hated disliked regretted")

POLARITY: Final = {
    **dict.fromkeys((*PRAISE, *PRAISE_VERBS, "recommend"), 1),
    **dict.fromkeys((*BLAME, *BLAME_VERBS, "avoid"), -1),
}
"""Opinion word -> +1 (praise) or -1 (blame)."""

NEGATORS: Final = frozenset(_words("not never hardly"))
DETERMINERS: Final = frozenset(_words("the its"))
FUNCTION_WORDS: Final = frozenset(_words("the a an and of to in it its i is are was were"))
VERBS: Final = frozenset(
    (
        *_words("is are was were felt feels seems found left watched saw noticed opened runs"),
        *PRAISE_VERBS,
        *BLAME_VERBS,
        "recommend",
        "avoid",
    )
)
