"""Stages that make records: other stages name them where they would name an entry of `data`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from align.spec.base import Produces
from align.spec.data import Format
from align.spec.stages import Stage


class RecordsStage(Stage):
    """A stage whose result is a file of records."""

    produces: ClassVar[Produces] = "records"

    @property
    @abstractmethod
    def makes(self) -> Format:
        """How its records are read."""
