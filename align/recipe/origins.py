"""Where every value of a recipe was written: a line of the file, or an override."""

from __future__ import annotations

from dataclasses import dataclass, field

Loc = tuple[str | int, ...]
"""Where a value stands: keys and list positions from the top."""


@dataclass(frozen=True)
class Origins:
    """Where every value of a recipe was written.

    Attributes:
        name: The file, as the user called it.
        lines: Line of every key and list item of the file.
        overrides: The `--set` argument that wrote a value, by its place.
    """

    name: str
    lines: dict[Loc, int]
    overrides: dict[Loc, str] = field(default_factory=dict)

    def line(self, loc: Loc) -> int:
        """The line of a key, or of the nearest one around it."""
        return next((self.lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in self.lines), 1)

    def where(self, loc: Loc) -> str:
        """``file:line: stages.dpo.beta``, or ``--set stages.dpo.beta=x`` where an override wrote it."""
        for n in range(len(loc), 0, -1):
            if loc[:n] in self.overrides:
                text = self.overrides[loc[:n]]
                return text if n == len(loc) else f"{text}: {dotted(loc)}"
            if loc[:n] in self.lines:
                break
        if loc and not any(known[: len(loc)] == loc for known in self.lines):
            for made, text in self.overrides.items():  # a mapping that an override made on its way
                if made[: len(loc)] == loc:
                    return text
        return f"{self.name}:{self.line(loc)}" + (f": {dotted(loc)}" if loc else "")

    def knows(self, loc: Loc) -> bool:
        """Whether this place is written in the recipe or an override."""
        return any(known[: len(loc)] == loc for table in (self.lines, self.overrides) for known in table)

    def forget(self, loc: Loc) -> None:
        """Drop what is known about a place and below it."""
        for table in (self.lines, self.overrides):
            for known in [known for known in table if known[: len(loc)] == loc]:
                del table[known]


def dotted(loc: Loc) -> str:
    """The place as `--set` takes it: ``stages.best.candidates.0``."""
    return ".".join(map(str, loc))
