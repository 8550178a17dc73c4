"""Shows that each flag earns its place: breaks the reference in one way at a time, and runs the
vectors against it.

    python -m golden.mutants [PATTERN ...]

mutants.txt lists the mutants: one function of the product each, with a piece of its text replaced.
A mutant is caught if a case with its flag fails, in float32. PATTERN chooses flags. Exit status 1
if a mutant is not caught.
"""

import fnmatch
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce

import torch

from golden import reference
from golden.check import judge
from golden.vectors import FOLDER, load_documents, resolve


@dataclass
class Mutant:
    """edits: pairs of a text that the function has once, and the text that takes its place."""

    flag: str
    target: str  # module:function or module:Class.method
    edits: list[tuple[str, str]] = field(default_factory=list)


def load_mutants() -> list[Mutant]:
    mutants = []
    for line in (FOLDER / "mutants.txt").read_text("utf-8").splitlines():
        if line.startswith("- "):
            mutants[-1].edits.append((line[2:], ""))
        elif line.startswith("+"):
            mutants[-1].edits[-1] = (mutants[-1].edits[-1][0], line[2:])
        elif line and not line.startswith("#"):
            mutants.append(Mutant(*line.split()))
    return mutants


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The product's function has the mutant's code. Raises ValueError for a text that it has not
    exactly once."""
    module_name, _, path = mutant.target.partition(":")
    module = importlib.import_module(module_name)
    found = reduce(getattr, path.split("."), module)
    function = inspect.unwrap(found)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in mutant.edits:
        if source.count(old) != 1:
            raise ValueError(f"{mutant.target} has {source.count(old)} times {old!r}; expected 1")
        source = source.replace(old, new)
    scope = {}
    exec(compile(source, mutant.target, "exec"), vars(module), scope)  # this project's own text
    kept, function.__code__ = function.__code__, inspect.unwrap(scope[path.split(".")[-1]]).__code__
    forget = getattr(found, "cache_clear", lambda: None)
    forget()
    try:
        yield
    finally:
        function.__code__ = kept
        forget()


def failing(documents: list[dict]) -> list[dict]:
    """The cases that the reference, as it is now, does not pass."""
    return [case for document in documents for case in document["cases"] if fails(document, case)]


def fails(document: dict, case: dict) -> bool:
    try:
        request = {"function": document["function"], "inputs": resolve(case["inputs"])}
        output = reference.answer(request)
    except Exception:
        return True
    return any(judge(document, case, output))


def main(patterns: list[str]) -> int:
    torch.set_num_threads(1)
    reference.DTYPE = torch.float32
    documents, uncaught = load_documents(), 0
    print(f"{'flag':28} {'mutant of':32} caught by")
    for mutant in load_mutants():
        if patterns and not any(fnmatch.fnmatch(mutant.flag, pattern) for pattern in patterns):
            continue
        affected = [document for document in documents if mutant.flag in document["flags"]]
        with applied(mutant):
            failed = failing(affected)
        flagged = [case["id"] for case in failed if mutant.flag in case["flags"]]
        uncaught += not flagged
        others = len(failed) - len(flagged)
        caught = f"{', '.join(flagged)}; {others} others" if flagged else "NOTHING"
        print(f"{mutant.flag:28} {mutant.target:32} {caught}", flush=True)
    return int(uncaught > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
