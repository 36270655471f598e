"""What a recipe file may be, and how every mistake in one is told: place, value, fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from align.errors import LaunchError, RecipeError
from align.recipe import load_recipe, resolve_env
from align.recipe.document import dump, parse, parse_value
from align.recipe.origins import Origins
from align.recipe.validate import validate

Refuse = Callable[..., str]

RECIPE = """\
name: demo
model: {base: base}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 8, format: prompt_completion}
  pairs: {path: pairs.jsonl, format: pairs}
stages:
  base: {kind: pretrain, data: corpus}
  sft: {kind: sft, data: corpus}
  dpo:
    kind: dpo
    policy: sft
    reference: sft
    data: pairs
    beta: 0.1
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("3.", 3.0),
        ("2", 2),
        ("-7", -7),
        ("0x1f", 31),
        ("010", 10),
        ("off", "off"),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("none", "none"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e10x", "1e10x"),
        ('"1e-4"', "1e-4"),
        ("'true'", "true"),
        ("1.2.3", "1.2.3"),
        ("[a, 1e-4, off]", ["a", 1e-4, "off"]),
        ("{a: {b: .5}}", {"a": {"b": 0.5}}),
        ("{1: a, true: b}", {"1": "a", "true": "b"}),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = parse_value(text, "--set")
    assert found == value
    assert type(found) is type(value)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


TRICKY = [
    "1e-4",
    "off",
    "null",
    "~",
    "",
    "0x10",
    "1.",
    ".5",
    "<<",
    "=",
    "!a",
    "&a",
    "- a",
    "1:30",
    "y",
    "a: b",
    "\u2028",
]


@given(plain | st.sampled_from(TRICKY))
def test_what_is_written_is_read_back(value: object) -> None:
    read = parse(dump({"key": value}), "x").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_lines_are_those_of_the_keys() -> None:
    document = parse("a: 1\nb:\n  - x\n  - {c: 2,\n     d: &d {e: 3}}\nf: *d\ng: {<<: *d, e: 4}\n", "x")
    wanted = {("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "c"): 4, ("b", 1, "d"): 5, ("b", 1, "d", "e"): 5}
    assert document.lines == wanted | {("f",): 6, ("f", "e"): 5, ("g",): 7, ("g", "e"): 7}
    assert document.data["g"] == {"e": 4}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "`a` is given twice (first in line 1)"),
        ("a:\n  b: 1\n  c: {d: 1, d: 2}\n", 3, "`d` is given twice (first in line 3)"),
        ("a:\n\tb: 1\n", 2, "spaces, not tabs"),
        ("a: 1\nb: [1, 2\nc: 3\n", 2, "close the bracket"),
        ("a: 1\nb: {c: 2\n", 2, "close the bracket"),
        ("a: 1\nb: [1, 2}\nc: 3\n", 2, "close the bracket"),
        ("a: 1\nb: 'x\nc: 3\n", 2, "close the quote"),
        ("a: 1\nb:2\nc: 3\n", 2, "with a space after the colon"),
        ("a:1\nb: 2\n", 1, "no space after the colon"),
        ("a: 1\nb\nc: 3\n", 2, "write `key: value`"),
        ("a: 1\nb: c: d\n", 2, "quote a text"),
        ("a:\n  b: 1\n c: 2\n", 3, "same indentation"),
        ("a:\n  b: 1\n   c: 2\n", 3, "indentation"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "remove the tag"),
        ("a: 1\nb: !x 2\n", 2, "remove the tag"),
        ("a: 1\n---\nb: 2\n", 2, "one document"),
        ("a: *b\n", 1, "undefined alias"),
        ("a: &a [*a]\n", 1, "inside the value it refers to"),
        ("a: 1\nb: .inf\n", 2, "not a finite number"),
        ("a: 1\nb: 1e999\n", 2, "not a finite number"),
        (f"a: {'9' * 5000}\n", 1, "5000 digits"),
        ("a: 1\nb: @x\n", 2, "quote a text"),
        ("a: 1\n? [b]\n: 2\n", 2, "a key must be a word"),
        ("a: 1\nb: \x07\n", 2, "U+0007"),
        ('a: "\\ud800"\n', 1, "surrogate"),
        ("a: 1\nb: {<<: 3}\n", 2, "`<<` wants a mapping"),
    ],
)
def test_bad_yaml(text: str, line: int, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "x.yaml")
    assert caught.value.where == f"x.yaml:{line}"
    assert said in str(caught.value)
    assert caught.value.fix


def test_bombs_do_not_go_off() -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(RecipeError, match="once aliases are expanded"):
        parse("\n".join(layers), "x")
    with pytest.raises(RecipeError, match="too deeply"):
        parse("[" * 10_000, "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the recipe is empty"),
        (b"# nothing\n", "the recipe is empty"),
        (b"- a\n- b\n", "the recipe is a list"),
        (b"hello\n", "the recipe is a str"),
        (b"name: x\ndescription: caf\xe9\n", "byte 0xe9 is not UTF-8"),
        (b"a: 1\n" * 300_000, "MB is no recipe"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        load_recipe(tmp_path / "x.yaml")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "sft_dpo.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"no such file; did you mean `sft_dpo\.yaml`\?"):
        load_recipe(tmp_path / "sft_dop.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    loaded = load_recipe(tmp_path / "x.yaml")
    assert loaded.where("stages", "dpo", "beta") == f"{tmp_path / 'x.yaml'}:14: stages.dpo.beta"


@pytest.mark.parametrize(
    ("old", "new", "told", "fix"),
    [
        # slips: the word that was meant comes first, and what follows from the slip is not told
        (
            "    reference: sft",
            "    refrence: sft",
            "12: stages.dpo.refrence: unknown key `refrence`; did you mean `reference`?",
            "",
        ),
        ("kind: sft,", "knid: sft,", "8: stages.sft.knid: unknown key `knid`; did you mean `kind`?", ""),
        ("kind: dpo", "kind: dop", '10: stages.dpo.kind: "dop" is not one of the choices; did you mean `dpo`?', ""),
        ("stages:", "stage:", "6: stage: unknown key `stage`; did you mean `stages`?", ""),
        (
            "format: pairs",
            "format: pair",
            '5: data.pairs.format: "pair" is not one of the choices; did you mean `pairs`?',
            "",
        ),
        ("generator:", "genrator:", "4: data.corpus.genrator: unknown key `genrator`; did you mean `generator`?", ""),
        ("{base: base}", "{bas: base}", "2: model.bas: unknown key `bas`; did you mean `base`?", ""),
        (
            "policy: sft",
            "policy: {adaptor: x}",
            "11: stages.dpo.policy.adaptor: unknown key `adaptor`; did you mean `adapter`?",
            "",
        ),
        # misplaced
        (
            "beta: 0.1",
            "epochs: 2",
            "14: stages.dpo.epochs: unknown key `epochs` here; did you mean `train.epochs`?",
            "",
        ),
        (
            "beta: 0.1",
            "train: {beta: 0.1}",
            "14: stages.dpo.train.beta: unknown key `beta` here; it is a setting of `stages.dpo`",
            "",
        ),
        ("beta: 0.1", "loss_on: all", "14: stages.dpo.loss_on: `dpo` takes no `loss_on`; `orpo`, `sft` would", ""),
        ("path: pairs.jsonl,", "path: pairs.jsonl, hub: x,", "5: data.pairs.hub: `path` takes no `hub`", ""),
        (
            "beta: 0.1",
            "bogus: 0.1",
            "14: stages.dpo.bogus: unknown key `bogus`",
            "known here: `engine`, `reference`, `train`,",
        ),
        ("{kind: sft,", "{kind:sft,", "8: no space after the colon in `kind:sft`", "write `kind: sft`"),
        # wrong types and values
        ("beta: 0.1", "beta: yes", '14: stages.dpo.beta: "yes" is not a number', ""),
        ("beta: 0.1", 'beta: "0.1"', '14: stages.dpo.beta: "0.1" is not a number', "write 0.1 without quotes"),
        ("beta: 0.1", "beta: 10%", '14: stages.dpo.beta: "10%" is not a number', "write 0.1"),
        (
            "beta: 0.1",
            "beta: 0",
            "14: stages.dpo.beta: 0 is out of range: must be greater than 0",
            "write a number greater than 0",
        ),
        ("beta: 0.1", "beta:", "14: stages.dpo.beta: must be a number, not empty", ""),
        (
            "beta: 0.1",
            "train: {max_steps: 1e3}",
            "14: stages.dpo.train.max_steps: 1000.0 is not a whole number",
            "write 1000",
        ),
        ("beta: 0.1", "train: {max_steps: true}", "14: stages.dpo.train.max_steps: true is not a whole number", ""),
        (
            "beta: 0.1",
            "train: 3",
            "14: stages.dpo.train: 3 is not a mapping",
            "write a mapping with `epochs`, `max_steps`,",
        ),
        (
            "beta: 0.1",
            "train: {epochs: 1, max_steps: 3}",
            "14: stages.dpo.train: give `epochs` or `max_steps`, not both",
            "",
        ),
        (
            "beta: 0.1",
            "model: {gradient_checkpointing: on}",
            '14: stages.dpo.model.gradient_checkpointing: "on" is not true or false',
            "write true",
        ),
        (
            "{base: base}",
            "{base: base, adapter: lora}",
            '2: model.adapter: "lora" is not a mapping or `none`',
            "write {kind: lora}, with its settings beside `kind`",
        ),
        (
            "{base: base}",
            "{base: base, adapter: {targets: q_proj}}",
            '2: model.adapter.targets: "q_proj" is not `all-linear` or a list',
            "write [q_proj]",
        ),
        ("{base: base}", "base", '2: model: "base" is not a mapping', "write {base: base}"),
        ("{base: base}", "{base: 3}", "2: model.base: 3 is not text", "put it in quotes"),
        ("policy: sft", "policy: [sft]", '11: stages.dpo.policy: ["sft"] is not the name of a stage or a mapping', ""),
        ("name: demo", "name: a b", '1: name: "a b" has a character that is not allowed', ""),
        # missing
        (
            "    data: pairs\n",
            "",
            "9: stages.dpo: `data` is missing",
            "add `data:` with the name of an entry of `data`",
        ),
        ("name: demo\n", "", "1: `name` is missing", "add `name:` with text"),
        ("path: pairs.jsonl, ", "", "5: data.pairs: one of `path`, `hub` or `generator` is missing", ""),
        ("kind: sft, ", "", "8: stages.sft: `kind` is missing", "add `kind:`, one of `dpo`,"),
        ("kind: sft", "kind: other", '8: stages.sft.kind: there is no kind "other"', "write one of `dpo`,"),
        (
            "{kind: sft, data: corpus}",
            "{kind: cpo, data: corpus, alpha: 1, beta: no}",
            '8: stages.sft.kind: "cpo" is not one of the choices; did you mean `dpo`?',
            "write `dpo` (or `ipo` or `ppo`), or install the package that provides `cpo`; "
            "`align methods` lists what there is",
        ),
        ("{kind: sft, data: corpus}", "", "8: stages.sft: must be a mapping, not empty", ""),
    ],
)
def test_one_mistake(refuse: Refuse, old: str, new: str, told: str, fix: str) -> None:
    assert old in RECIPE
    lines = refuse(RECIPE.replace(old, new, 1)).splitlines()
    assert len(lines) == 2 or (len(lines) == 1 and not fix), lines
    assert lines[0].startswith(told), lines
    assert "\n".join(lines[1:]).startswith(f"  fix: {fix}" if fix else ""), lines


def test_a_guessed_kind_hides_nothing_in_what_all_kinds_share(refuse: Refuse) -> None:
    text = RECIPE.replace("kind: dpo", "kind: dop").replace("beta: 0.1", "beta: x\n    train: {max_steps: x}")
    places = [line.partition(": ")[2].partition(":")[0] for line in refuse(text).splitlines() if "fix:" not in line]
    assert places == ["stages.dpo.kind", "stages.dpo.train.max_steps"]


@pytest.mark.parametrize(("old", "new", "word"), [("sft,", "other,", "other"), ("dpo", "dop", "dop")])
def test_an_unknown_kind_may_be_a_package_that_is_not_installed(refuse: Refuse, old: str, new: str, word: str) -> None:
    told = refuse(RECIPE.replace(f"kind: {old}", f"kind: {new}"))
    assert told.endswith(f", or install the package that provides `{word}`; `align methods` lists what there is")


def test_a_misspelt_key_kind_is_no_package(refuse: Refuse) -> None:
    assert "package" not in refuse(RECIPE.replace("kind: sft", "knid: sft"))


def test_all_mistakes_are_told_at_once_slips_first(refuse: Refuse) -> None:
    text = RECIPE.replace("beta: 0.1", "beta: x").replace("rows: 8", "rows: 0").replace("sft, data", "sft, dtaa")
    places = [line.partition(": ")[0] for line in refuse(text).splitlines() if "fix:" not in line]
    assert places == ["8", "4", "14"]


def test_no_more_than_twenty_are_told(refuse: Refuse) -> None:
    text = RECIPE + "".join(f"  s{i}: {{kind: sft, data: 3}}\n" for i in range(30))
    told = refuse(text).splitlines()
    assert len([line for line in told if "is not the name of an entry" in line]) == 20
    assert told[-1] == "and 10 more"


class Wide(BaseModel, extra="forbid"):
    kind: Literal["abc"] = "abc"
    width: int


class High(BaseModel, extra="forbid"):
    kind: Literal["abd"] = "abd"
    height: int


class Box(BaseModel, extra="forbid"):
    shape: Annotated[Wide | High, Field(discriminator="kind")]


@pytest.mark.parametrize(("side", "meant"), [("width", "abc"), ("height", "abd"), ("heigth", "abd")])
def test_of_two_equally_near_kinds_the_one_that_fits_is_meant(side: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean `{meant}`") as caught:
        validate(Box, {"shape": {"kind": "abx", side: 3}}, Origins("x", {("shape", side): 5, ("shape", "kind"): 4}))
    assert caught.value.where == "x:4: shape.kind"


@pytest.mark.parametrize(
    ("override", "loc", "value"),
    [
        ("stages.dpo.beta=0.5", ("stages", "dpo", "beta"), 0.5),
        ("stages.dpo.train.learning_rate=1e-5", ("stages", "dpo", "train", "learning_rate"), 1e-5),
        ("model.adapter=none", ("model", "adapter"), "none"),
        ("model.adapter={rank: 4}", ("model", "adapter", "rank"), 4),
        ("launch.deepspeed=zero2", ("launch", "deepspeed"), "zero2"),
        ("logging.report_to=[wandb]", ("logging", "report_to", 0), "wandb"),
        ("description=a=b", ("description",), "a=b"),
    ],
)
def test_overrides(tmp_path: Path, override: str, loc: tuple[str | int, ...], value: object) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE)
    loaded = load_recipe(path, ["stages.dpo.beta=0.4", override])
    found = loaded.recipe.model_dump()
    for item in loc:
        found = found[item]
    assert found == value
    assert loaded.where(*loc).startswith(f"--set {override}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.dpo.betta=1", "--set stages.dpo.betta=1: unknown key `betta`; did you mean `beta`"),
        ("stages.dop.beta=1", "--set stages.dop.beta=1: `stages` has no entry `dop`; did you mean `dpo`?"),
        ("modle.base=x", "--set modle.base=x: unknown key `modle`; did you mean `model`"),
        ("stages.dpo.beta=x", '--set stages.dpo.beta=x: "x" is not a number'),
        ("stages.dpo.beta", "--set stages.dpo.beta: an override wants a path and a value"),
        ("description=", "--set description=: must be text, not empty"),
        ("=3", "--set =3: an override wants a path and a value"),
        ("stages..beta=3", "--set stages..beta=3: an override wants a path and a value"),
        ("name.x=3", "--set name.x=3: `name` is no mapping"),
        ("model=[a", "--set model=[a: not valid YAML"),
        (
            "model={base: base, adaptor: none}",
            "--set model={base: base, adaptor: none}: model.adaptor: unknown key `adaptor`; did you mean `adapter`?",
        ),
        ("stages.dpo.policy=stf", "--set stages.dpo.policy=stf: there is no stage `stf`; did you mean `sft`?"),
    ],
)
def test_bad_overrides(refuse: Refuse, override: str, said: str) -> None:
    assert refuse(RECIPE, override).startswith(said)


def test_list_items_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE + "  c: {kind: compare, candidates: [base, sft], baseline: sft, prompts: corpus}\n")
    assert load_recipe(path, ["stages.c.candidates.0=dpo"]).stages["c"].candidates == ["dpo", "sft"]
    for index in ("2", "-1", "x", "²"):
        with pytest.raises(RecipeError, match="is a list of 2"):
            load_recipe(path, [f"stages.c.candidates.{index}=dpo"])


def test_secrets_stay_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse) -> None:
    text = RECIPE.replace("path: pairs.jsonl", 'path: "${env:ALIGN_SECRET}/pairs.jsonl"')
    monkeypatch.setenv("ALIGN_SECRET", "swordfish")
    (tmp_path / "x.yaml").write_text(text)
    loaded = load_recipe(tmp_path / "x.yaml")
    assert loaded.recipe.data["pairs"].path == "${env:ALIGN_SECRET}/pairs.jsonl"
    assert resolve_env({"a": ["${env:ALIGN_SECRET}!", 3]}) == {"a": ["swordfish!", 3]}
    told = refuse(text)
    assert "there is no file ${env:ALIGN_SECRET}/pairs.jsonl" in told
    assert "swordfish" not in told
    monkeypatch.delenv("ALIGN_SECRET")
    assert refuse(text).startswith("5: data.pairs.path: the environment variable ALIGN_SECRET is not set")
    with pytest.raises(LaunchError, match="ALIGN_SECRET is not set"):
        resolve_env("${env:ALIGN_SECRET}")
    assert refuse(text.replace("${env:ALIGN_SECRET}", "${env:}")).startswith("5: data.pairs.path: ")


def test_numbers_stay_exact(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.replace("beta: 0.1", "beta: 1e-3"))
    assert math.isclose(load_recipe(path).stages["dpo"].beta, 0.001, rel_tol=0)
