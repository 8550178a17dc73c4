"""Tasks of the reasoning-gym package, judged by its own scorers. Runs in worker processes of verify.py, limited in time and memory: the
package's generators and scorers are not ours.

A task is written "NAME" or "NAME?option=value&option=value"; the options are those of its reasoning-gym config.
"""

import hashlib
import json
import re
import sys
from functools import lru_cache
from urllib.parse import parse_qsl

SPLITS = {"train": range(2, 10), "heldout": range(2)}  # tenths of all questions
SIZE = 20_000  # entries of a seed, of which the first different ones are taken; an entry's own seed is the dataset's plus its index


def entries(task: str, size: int, seed: int, split: str) -> list[tuple[int, str, str]]:
    """(index, question, answer) of size different entries of a split, drawn by seed; the splits share no question, for any seed.

    Raises ValueError for an unknown task or option, or a task with too few different questions.
    """
    found: dict[str, tuple[int, str, str]] = {}
    for index in range(SIZE):
        entry = _entry(task, seed, index)
        question = entry["question"]
        if hashlib.sha256(question.encode()).digest()[0] % 10 in SPLITS[split]:
            found.setdefault(question, (index, question, str(entry["answer"])))
            if len(found) == size:
                return list(found.values())
    raise ValueError(
        f"reasoning_gym:{task}: {len(found)} different {split} questions among {SIZE} entries, {size} wanted"
    )


def score(task: str, seed: int, index: int, answers: list[str]) -> float:
    """The best score that the task's own scorer gives the answers; 1.0 is right, less is partly right or wrong."""
    return max(_score(task, seed, index, answer) for answer in answers)


def _score(task: str, seed: int, index: int, answer: str) -> float:
    global _judged
    dataset, entry = _dataset(task, seed), _entry(task, seed, index)
    try:
        _judged = answer
        return float(dataset.score_answer(answer, entry))
    except Exception:  # a scorer that stumbles over an answer has not found it right
        return 0.0
    finally:
        _judged = ""


@lru_cache(maxsize=64)
def _dataset(task: str, seed: int):
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("reasoning-gym is not installed: pip install reasoning-gym") from None
    name, _, query = task.partition("?")
    try:
        options = {
            key: _value(text)
            for key, text in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        }
        return reasoning_gym.create_dataset(name, **({"size": SIZE} | options), seed=seed * SIZE)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning_gym:{task}: {error}") from None


@lru_cache(maxsize=4096)
def _entry(task: str, seed: int, index: int) -> dict:
    return _dataset(task, seed)[index]


def _value(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


# ---- some scorers hand the answer to eval, or to sympy's parse_expr, which does. What they get to evaluate is plain arithmetic and lists.

_judged = ""  # the answer that a scorer is looking at
_MATHS = re.compile("a?(sin|cos|tan)h?|sec|csc|cot|log|ln|exp|sqrt|[aA]bs")
_ATTRIBUTE = re.compile(r"__|[\\#@`;{}]|\.\s*[^\W\d]")
_CALL = re.compile(r"(\w+|\S)?\s*\(")  # and what stands before the parenthesis


def is_plain(text: str) -> bool:
    """No attribute, no call but of a function of mathematics, and nothing from which either could be made."""
    callers = (found[1] or "(" for found in _CALL.finditer(text))
    return not _ATTRIBUTE.search(text) and all(
        _MATHS.fullmatch(caller) or caller in "+-*/(,[=<>^|&~%" for caller in callers
    )


def _guard(event: str, arguments: tuple) -> None:
    if event == "compile" and arguments[1] == "<string>" and not is_plain(_judged):
        raise PermissionError(
            "the scorer was going to evaluate an answer that is not plain arithmetic"
        )


sys.addaudithook(_guard)
