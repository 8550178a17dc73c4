"""Tasks of the reasoning-gym package: questions, and a reward by the task's own scorer.

The package's code is not ours, so this module runs in the worker processes of answers/workers.py,
with limits of time and memory. A task is "NAME" or "NAME?option=value&option=value", with the
options of its reasoning-gym config.
"""

import contextlib
import hashlib
import json
import re
import sys
from functools import lru_cache
from urllib.parse import parse_qsl

from answers.extract import extract_answer, extract_boxed, extract_tagged
from config import UserError

try:
    import reasoning_gym
except ImportError:
    raise UserError("reasoning-gym is not installed: pip install reasoning-gym") from None

SPLITS = {"train": range(2, 10), "heldout": range(2)}  # tenths of all questions
SIZE = 20_000  # entries that a seed may look at; entry i of a seed has the seed seed * SIZE + i


def entries(task: str, size: int, seed: int, split: str) -> list[dict]:
    """The arguments of Problem for size different entries of a split, drawn by seed.

    The splits share no question, for any seeds. Raises UserError for an unknown task or option,
    and for a task with too few different questions.
    """
    found: dict[str, dict] = {}
    for index in range(SIZE):
        entry = _entry(task, seed, index)
        question = entry["question"]
        if hashlib.sha256(question.encode()).digest()[0] % 10 in SPLITS[split]:
            fields = {"task": task, "seed": seed, "index": index}
            problem = {"id": f"{task.partition('?')[0]}:{seed}:{index}", "fields": fields}
            problem |= {"prompt": question, "answer": str(entry["answer"])}
            found.setdefault(question, problem | {"kind": "data.gym:reward"})
            if len(found) == size:
                return list(found.values())
    count = f"{len(found)} different {split} questions among {SIZE} entries"
    raise UserError(f"reasoning_gym:{task}: {count}, {size} wanted")


def reward(problem, response: str) -> bool:
    """Whether the task's own scorer gives 1.0 to the marked answer; without a mark, to the whole
    response or to the answer that is found in it. Less is a wrong answer that could be gamed."""
    global _judged
    task, seed, index = (problem.fields[name] for name in ("task", "seed", "index"))
    dataset, entry, scores = _dataset(task, seed), _entry(task, seed, index), [0.0]
    marked = extract_tagged(response) or extract_boxed(response)
    answers = {marked} if marked else {response.strip(), extract_answer(response)} - {None, ""}
    for _judged in answers:
        with contextlib.suppress(Exception):  # a scorer that fails has not found the answer right
            scores.append(float(dataset.score_answer(_judged, entry)))
    _judged = ""
    return max(scores) == 1.0


@lru_cache(maxsize=64)
def _dataset(task: str, seed: int):
    name, _, query = task.partition("?")
    options = {"size": SIZE}
    try:
        for key, text in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
            options[key] = text
            with contextlib.suppress(json.JSONDecodeError):
                options[key] = json.loads(text)
        return reasoning_gym.create_dataset(name, **options, seed=seed * SIZE)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning_gym:{task}: {error}") from None


@lru_cache(maxsize=4096)
def _entry(task: str, seed: int, index: int) -> dict:
    return _dataset(task, seed)[index]


# Some scorers give the answer to eval, or to sympy's parse_expr, which calls eval. The audit hook
# lets them evaluate plain arithmetic and lists only.
_judged = ""  # the answer that a scorer is looking at
_MATHS = re.compile("a?(sin|cos|tan)h?|sec|csc|cot|log|ln|exp|sqrt|[aA]bs")
_ATTRIBUTE = re.compile(r"__|[\\#@`;{}]|\.\s*[^\W\d]")
_CALL = re.compile(r"(\w+|\S)?\s*\(")  # and what stands before the parenthesis


def _guard(event: str, arguments: tuple) -> None:
    """Allow no attribute, no call except of mathematical functions, and no way to write either."""
    if event != "compile" or arguments[1] != "<string>":
        return
    callers = [found[1] or "(" for found in _CALL.finditer(_judged)]
    plain = all(_MATHS.fullmatch(c) or c in "+-*/(,[=<>^|&~%" for c in callers)
    if not plain or _ATTRIBUTE.search(_judged):
        raise PermissionError("the scorer would evaluate an answer that is not plain arithmetic")


sys.addaudithook(_guard)
