"""Strings in, verdict out: is a response right?

verify chooses by problem.kind: "countdown" (data/countdown.py judges the derivation), "math"
(the extracted answer equals the gold answer, answers/) or "module:function" (a reward function, in
a worker process).
"""

import os
import reprlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from answers.extract import extract_answer
from answers.symbolic import judge
from answers.workers import ask_worker, find_function
from config import UserError
from data import Problem, countdown

MAX_WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str  # "correct" | "partial" | "wrong" | "no_answer" | "unparsable" | "timeout"
    answer: str | None = None  # the text that was judged
    reward: float = 0.0  # from 0 to 1; correct is 1, partial between them


def _verdict(reason: str, answer: str | None = None) -> Verdict:
    return Verdict(reason == "correct", reason, answer, float(reason == "correct"))


def verify_many(
    problems: Sequence, responses: Sequence[str], timeout_s: float = 5.0, num_workers=MAX_WORKERS
) -> list[Verdict]:
    """The verdicts of verify, in the order of the responses, from num_workers threads: as many
    worker processes run at a time."""
    pairs = list(zip(problems, responses, strict=True))
    needs_no_worker = all(problem.kind == "countdown" for problem in problems)
    with ThreadPoolExecutor(num_workers) as pool:
        map_ = map if needs_no_worker else pool.map
        return list(map_(lambda pair: verify(*pair, timeout_s), pairs))


def verify(problem, response: str, timeout_s: float = 5.0) -> Verdict:
    """The verdict of the problem's judge on a response.

    Countdown and mathematics without integrals are judged in this process, by code whose work is
    bounded; integrals (sympy) and reward functions in a worker process, for at most timeout_s.
    Raises UserError for a problem of an unknown kind, and for a reward function that cannot be
    imported, raises, or does not return a number from 0 to 1.
    """
    if problem.kind == "countdown":
        return verify_countdown(response, problem.numbers, problem.target)
    if problem.kind == "math":
        return verify_math(response, problem.answer, timeout_s, tolerance=problem.tolerance)
    if ":" in problem.kind:
        return _verify_by_reward(problem, response, timeout_s)
    kinds = "'countdown', 'math' or 'module:function'"
    raise UserError(f"problem {problem.id!r}: kind {problem.kind!r} has no judge; expected {kinds}")


def check_reward(problems: Sequence) -> None:
    """Raises UserError unless the first problem's judge judges an empty response."""
    for problem in problems[:1]:
        if verify(problem, "").reason == "timeout":
            what = "an empty response is not judged within the limits"
            raise UserError(f"reward {problem.kind}: {what} of time and memory")


def _verify_by_reward(problem, response: str, timeout_s: float) -> Verdict:
    arguments, module = [problem.kind, vars(problem), response], problem.kind.partition(":")[0]
    try:
        reward = ask_worker("verify:call_reward", arguments, timeout_s, module)
    except UserError as error:
        place = f"reward {problem.kind}, problem {problem.id!r}, response {response[:200]!r}"
        raise UserError(f"{place}: {error}") from None
    reason = {None: "timeout", 0: "wrong", 1: "correct"}.get(reward, "partial")
    return Verdict(reward == 1, reason, response, reward or 0.0)


def call_reward(path: str, problem: dict, response: str) -> float:
    """What the reward function at "module:function" gives a response; runs in a worker process."""
    problem["fields"] = MappingProxyType(problem["fields"])
    value = find_function(path)(Problem(**problem), response)
    if not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise UserError(f"returned {reprlib.repr(value)}; expected a bool or a number from 0 to 1")
    return float(value)


def verify_math(
    response: str, gold: str, timeout_s: float = 5.0, *, tolerance: float = 0.0
) -> Verdict:
    """Does the response's final answer equal gold, or differ by tolerance (absolute) at most?"""
    answer = extract_answer(response)
    if answer is None:
        return _verdict("no_answer")
    return answers_match(gold, answer, timeout_s, tolerance=tolerance)


def answers_match(
    gold: str, answer: str, timeout_s: float = 5.0, *, tolerance: float = 0.0
) -> Verdict:
    """Is the answer equal to gold, by the rules of answers/equality.py?

    Integrals are compared by sympy, in a worker that is killed at timeout_s. An unparsable gold is
    never a reward.
    """
    return _verdict(judge(gold, answer, tolerance, timeout_s), answer)


def verify_countdown(response: str, numbers: Sequence[int], target: int | Fraction) -> Verdict:
    """Does the response make target from numbers, each used exactly once? See countdown.judge."""
    return _verdict(*countdown.judge(response, numbers, target))
