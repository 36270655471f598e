from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from align.data.equations import equations, is_true


def test_in_order_without_spaces() -> None:
    assert equations("a <<2 * 4 = 8>>8, b\n<<8/3=2.67>>2.67") == ["2*4=8", "8/3=2.67"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("", []), ("no calculation", []), ("<<2+2=4", []), ("2+2=4>>", []), ("<<>>", [""]), ("a <<1<<2>> b", ["1<<2"])],
)
def test_broken_marks(text: str, found: list[str]) -> None:
    assert equations(text) == found


def test_marks_without_an_end_take_linear_time() -> None:
    began = time.perf_counter()
    assert equations("<<" * 200_000) == []
    assert len(equations("<<" * 200_000 + ">>")) == 1
    assert time.perf_counter() - began < 1.0


@pytest.mark.parametrize(
    "equation", ["2+2=4", "10/3=3.3335", "3,650*10/100=365", "4=2+2", "2+2=4=5", "180//3=60", "$5*2=$10", "20%*50=10"]
)
def test_true(equation: str) -> None:
    assert is_true(equation)


@pytest.mark.parametrize(
    "equation", ["2+2=5", "10/3=3.335", "", "83.3", "x=11", "1/0=0", "1=1/0", "=", "4=", "2:15+2:38=8:40", "2**2=4"]
)
def test_untrue_or_no_equation(equation: str) -> None:
    assert not is_true(equation)


@pytest.mark.parametrize(("file", "expected"), [("gsm8k_train", 23_716), ("gsm8k_test", 4_282)])
def test_every_equation_of_gsm8k_is_true(align_data: Path, file: str, expected: int) -> None:
    lines = (align_data / "math" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [equation for line in lines for equation in equations(json.loads(line)["answer"])]
    assert len(found) == expected
    assert [equation for equation in found if not is_true(equation)] == []
