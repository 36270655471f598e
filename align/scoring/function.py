"""A user's Python function as a scorer: ``path/to/file.py:function`` in a recipe.

The function takes the prompt, the completion and, by name, columns of the prompt's row, and returns a number:

    def exact(prompt: str, completion: str, answer: str) -> float:
        return float(completion.strip() == answer)

Its file is code, and code runs only where it is allowed. The file is read once: the bytes that run are those of the
digest. It is not on the import path of others, and what lies beside it is not on its own; what it imports has to be
installed, and is not part of the digest.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import AlignError, DataError, RecipeError
from align.recipe.suggest import did_you_mean

EXAMPLE = "def score(prompt: str, completion: str, answer: str) -> float"


@dataclass(frozen=True)
class FunctionScorer:
    """A function that was loaded.

    Attributes:
        label: Its name, and that of its column in results.
        path: Its file.
        digest: SHA-256 of the file's bytes.
        reads: The columns that it takes as parameters.
        function: It.
    """

    label: str
    path: Path
    digest: str
    reads: tuple[str, ...]
    function: Callable[..., Any]

    def score(self, prompt: str, completion: str, **fields: Any) -> Any:
        """What the function returns; whoever calls it checks that this is a score.

        Raises:
            DataError: The function raised something.
        """
        try:
            return self.function(prompt, completion, **fields)
        except AlignError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"`{self.label}` raised {_named(error)}",
                where=f"{self.path}:{_line(error, self.path) or _first_line(self.function)}",
                fix="mend the function, or the row that it cannot score",
            ) from error


def function_file(name: str, folder: Path) -> tuple[Path, str]:
    """The file and the function that ``file.py:function`` names.

    Raises:
        RecipeError: It names none, or there is no such file.
    """
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise RecipeError(f"`{name}` names no function", where="functions", fix="write path/to/file.py:function")
    path = folder / file
    if not path.is_file():
        raise RecipeError(f"there is no file {path}", where="functions", fix=f"paths start at {folder}/")
    return path, function


def load_function(name: str, folder: Path, *, allowed: bool, digest: str | None = None) -> FunctionScorer:
    """Runs a user's file and takes a function out of it.

    Args:
        name: ``path/to/file.py:function``.
        folder: Where relative paths start: the recipe's folder.
        allowed: Whether the user said that code may run.
        digest: What the file's digest has to be, where it is known: the one that went into a fingerprint.

    Raises:
        RecipeError: There is no such function, it may not run, its file does not run, it takes something else than a
            prompt, a completion and columns, or the file has changed.
    """
    path, function_name = function_file(name, folder)
    if not allowed:
        raise RecipeError(
            f"{path} is code that align did not write, and nothing said that it may run",
            where="functions",
            fix="read it, then add --allow-code",
        )
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}", where="functions", fix="make it readable"
        ) from error
    found = hashlib.sha256(source).hexdigest()
    if digest not in (None, found):
        raise RecipeError(f"{path} has changed since the run was planned", where="functions", fix="run it again")
    names = _run(source, path, found)
    if function_name not in names:
        own = [key for key, value in names.items() if inspect.isfunction(value)]
        raise RecipeError(
            f"there is no function `{function_name}` in it{did_you_mean(function_name, own)}",
            where=str(path),
            fix=f"one of: {', '.join(own) or 'none is defined'}",
        )
    function = names[function_name]
    return FunctionScorer(function_name, path, found, _columns(function, function_name, path), function)


def _run(source: bytes, path: Path, digest: str) -> dict[str, Any]:
    """What a file defines."""
    module = types.ModuleType(f"align_function_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up the module of their class there
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 - the user said --allow-code
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or _line(error, path) or 1
        raise RecipeError(f"it does not run: {_named(error)}", where=f"{path}:{line}", fix="mend the file") from error
    except (Exception, SystemExit) as error:
        fix = "install what it imports" if isinstance(error, ImportError) else "mend the file"
        raise RecipeError(
            f"it does not run: {_named(error)}", where=f"{path}:{_line(error, path) or 1}", fix=fix
        ) from error
    return module.__dict__


def _columns(function: Any, name: str, path: Path) -> tuple[str, ...]:
    """The parameters after prompt and completion: the columns of the row that it reads.

    Raises:
        RecipeError: It cannot be called with two texts and columns by name.
    """
    where = f"{path}:{_first_line(function)}"
    if not callable(function) or inspect.isclass(function) or _is_deferred(function):
        raise RecipeError(f"`{name}` is no plain function", where=where, fix=EXAMPLE)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the parameters of `{name}` cannot be told", where=where, fix=EXAMPLE) from error
    texts, columns = parameters[:2], parameters[2:]
    if len(texts) < 2 or any(each.kind not in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in texts):
        raise RecipeError(f"`{name}` does not take a prompt and a completion", where=where, fix=EXAMPLE)
    for each in columns:
        # A column is read or it is not: a default or **fields would leave open which, and nobody would see.
        if each.kind not in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) or each.default is not each.empty:
            raise RecipeError(
                f"the parameter `{each}` of `{name}` does not name one column that it needs",
                where=where,
                fix=f"name each column that it reads, without a default: {EXAMPLE}",
            )
    return tuple(each.name for each in columns)


def _is_deferred(function: Any) -> bool:
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(kind(function) for kind in kinds)


def _named(error: BaseException) -> str:
    text = str(error.msg if isinstance(error, SyntaxError) else error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException, path: Path) -> int | None:
    """The line of a file that an error comes from: the innermost one."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _first_line(function: Any) -> int:
    return getattr(getattr(function, "__code__", None), "co_firstlineno", 1)
