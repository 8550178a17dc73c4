"""Strings in, verdict out: is a response right?

verify_many chooses by problem.kind: "countdown" (data/countdown.py judges the derivation), "math"
(the extracted answer equals the gold answer, answers/) or "gym" (the scorer of a reasoning-gym
task, data/gym.py, in a worker process).
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

from answers.equality import compare
from answers.extract import extract_answer, extract_boxed, extract_tagged
from answers.symbolic import ask_sympy, judge
from answers.workers import ask_worker
from data import countdown

MAX_WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str  # "correct" | "wrong" | "no_answer" | "unparsable" | "timeout"
    answer: str | None = None  # the text that was judged


def _verdict(reason: str, answer: str | None = None) -> Verdict:
    return Verdict(reason == "correct", reason, answer)


def verify_many(
    problems: Sequence, responses: Sequence[str], timeout_s: float = 5.0, num_workers=MAX_WORKERS
) -> list[Verdict]:
    """One verdict for each (problem, response), in order.

    Countdown and mathematics without integrals are judged in this process, by code whose work is
    bounded. Integrals (sympy) and the scorers of reasoning-gym run in up to num_workers worker
    processes at a time, each call for at most timeout_s.
    Raises ValueError for a problem of an unknown kind.
    """
    pairs = list(zip(problems, responses, strict=True))
    verdicts = [_verify_here(problem, response) for problem, response in pairs]
    undecided = [i for i, verdict in enumerate(verdicts) if verdict.reason == "undecided"]
    if undecided:
        with ThreadPoolExecutor(min(num_workers, len(undecided))) as pool:
            reasons = pool.map(
                lambda i: _ask_worker(problems[i], verdicts[i].answer, timeout_s), undecided
            )
            for i, reason in zip(undecided, reasons, strict=True):
                verdicts[i] = _verdict(reason, verdicts[i].answer)
    return verdicts


def verify(problem, response: str, timeout_s: float = 5.0) -> Verdict:
    """The verdict of one response; see verify_many."""
    return verify_many([problem], [response], timeout_s)[0]


def _verify_here(problem, response: str) -> Verdict:
    if problem.kind == "countdown":
        return verify_countdown(response, problem.numbers, problem.target)
    if problem.kind == "gym":
        return _verdict("undecided" if response.strip() else "no_answer", response)
    if problem.kind != "math":
        raise ValueError(
            f"problem {problem.id!r}: kind {problem.kind!r} has no verifier; "
            "expected 'countdown', 'math' or 'gym'"
        )
    answer = extract_answer(response)
    if answer is None:
        return _verdict("no_answer")
    return _verdict(compare(problem.answer, answer, problem.tolerance), answer)


def _ask_worker(problem, answer: str, timeout_s: float) -> str:
    if problem.kind == "math":
        return ask_sympy(problem.answer, answer, timeout_s)
    # the marked answer, else the whole response and the answer that is found in it
    marked = extract_tagged(answer) or extract_boxed(answer)
    candidates = [marked] if marked else [answer.strip(), extract_answer(answer) or ""]
    arguments = [problem.task, *problem.entry, list(dict.fromkeys(candidates))]
    score = ask_worker("score", arguments, timeout_s)
    return "timeout" if score is None else "correct" if score == 1.0 else "wrong"


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
