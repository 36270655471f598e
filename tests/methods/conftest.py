"""The numbers the methods are checked against, and every method in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.methods import Method, all_methods

VECTORS = Path(__file__).with_name("vectors.json")


@pytest.fixture(scope="session")
def vectors() -> dict[str, dict[str, Any]]:
    return json.loads(VECTORS.read_text())


@pytest.fixture(params=sorted(all_methods()))
def method(request: pytest.FixtureRequest) -> Method:
    return all_methods()[request.param]
