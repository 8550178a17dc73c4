"""Problems and demonstrations: what the policy is asked, and which verifier judges it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from answers.symbolic import judge
from answers.workers import ask_worker
from data import countdown, files

GYM_GENERATION_S = 600.0
MAX_SHOWN = 20  # broken records that an error lists


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question. kind says which verifier judges it, and by which fields: "countdown" (numbers, target), "math" (answer, tolerance) or
    "gym" (task, entry)."""

    id: str
    prompt: str  # the question's text, before the prompt template
    answer: str
    kind: str
    numbers: tuple[int, ...] = ()
    target: int = 0
    tolerance: float = 0.0  # absolute
    task: str = ""  # reasoning-gym's task with its options
    entry: tuple[int, ...] = ()  # seed and index of its entry
    context: tuple[tuple[str, str], ...] = ()  # (role, content) of the messages before the question


def load_problems(
    source: str,
    *,
    size: int = 0,
    seed: int = 0,
    countdown_numbers: int = 3,
    countdown_max: int = 20,
) -> list[Problem]:
    """Problems of a source, the same for the same arguments, each question once (what is left out is printed).

    source: "countdown:train", "countdown:heldout", "countdown:search" (generated); "reasoning_gym:TASK" or "reasoning_gym:TASK:heldout"
    (the package's generators; options of the task may follow, "?max_terms=3&max_digits=2"); or the path of a .jsonl, .json, .csv or
    .parquet file in one of the formats of data/files.py. Generated splits share no question. size: how many, drawn by seed; 0 = the
    whole file.
    Raises ValueError naming the file, place and field of a broken record, an unreadable gold answer, an unknown source, or a size that
    the source cannot give.
    """
    if source.startswith("countdown:"):
        games = countdown.generate_games(
            source.removeprefix("countdown:"),
            size=size,
            seed=seed,
            num_numbers=countdown_numbers,
            max_number=countdown_max,
        )
        return [_countdown_problem(numbers, target) for numbers, target in games]
    if source.startswith("reasoning_gym:"):
        return _gym_problems(source, size, seed)
    problems: dict[str, Problem] = {}
    ids: dict[str, str] = {}
    num_records, contradicted, unreadable = 0, {}, []
    for record, where in files.read_records(source):
        num_records += 1
        try:
            problem = _problem(record, where)
        except files.UnreadableGold as error:
            unreadable.append(str(error))
            continue
        key = question_key(problem)
        first = problems.setdefault(key, problem)
        if ids.setdefault(first.id, key) != key:
            raise ValueError(
                f"{where}: id {first.id!r} stands in the file twice, for different questions"
            )
        if first.answer != problem.answer and judge(first.answer, problem.answer) != "correct":
            contradicted[key] = where
    if unreadable:
        shown = "".join(f"\n  {error}" for error in unreadable[:MAX_SHOWN]) + (
            "\n  ..." if len(unreadable) > MAX_SHOWN else ""
        )
        raise ValueError(
            f"{source}: {len(unreadable)} of {num_records} records are to be mended or removed:{shown}"
        )
    if num_records > len(problems):
        print(
            f"{source}: {num_records} records, {len(problems)} different questions; the repetitions are left out"
        )
    if contradicted:
        first_place = next(iter(contradicted.values()))
        print(
            f"{source}: {len(contradicted)} questions are left out whose answers contradict each other, first at {first_place}"
        )
    return _subset(
        [problem for key, problem in problems.items() if key not in contradicted],
        size,
        seed,
        source,
    )


def question_key(problem: Problem) -> str:
    """What makes two questions the same: their text without white space, or of Countdown the numbers in any order and the target."""
    if problem.kind == "countdown":
        return f"countdown:{sorted(problem.numbers)}->{problem.target}"
    return "".join(problem.prompt.split())


def check_overlap(
    train: list[Problem], heldout: list[Problem], train_source: str, heldout_source: str
) -> None:
    """Raises ValueError when a held-out question is among the training questions."""
    trained = {question_key(problem): problem.id for problem in train}
    shared = [problem for problem in heldout if question_key(problem) in trained]
    if shared:
        raise ValueError(
            f"data: {len(shared)} of the {len(heldout)} questions of data.eval = {heldout_source!r} are among those of data.train = "
            f"{train_source!r}, first {shared[0].id!r} ({shared[0].prompt[:60]!r})"
        )


def load_demonstrations(
    source: str,
    *,
    size: int = 0,
    seed: int = 0,
    countdown_numbers: int = 3,
    countdown_max: int = 20,
) -> list[tuple[str, str]]:
    """(question, response) pairs to imitate: "countdown:skills", "countdown:habit" (generated), or a .jsonl file of {problem, response}."""
    if source.startswith("countdown:"):
        demos = countdown.generate_demonstrations(
            source.removeprefix("countdown:"),
            size=size,
            seed=seed,
            num_numbers=countdown_numbers,
            max_number=countdown_max,
        )
        return [
            (countdown.question(numbers, target), response) for numbers, target, response in demos
        ]
    pairs = [
        (files.question(record, where)[0], files.text_of(record, ("response",), where))
        for record, where in files.read_records(source)
    ]
    return _subset(pairs, size, seed, source)


def _countdown_problem(numbers: tuple[int, ...], target: int) -> Problem:
    return Problem(
        id=f"countdown:{','.join(map(str, numbers))}->{target}",
        prompt=countdown.question(numbers, target),
        answer=str(target),
        kind="countdown",
        numbers=numbers,
        target=target,
    )


def _gym_problems(source: str, size: int, seed: int) -> list[Problem]:
    name, _, options = source.removeprefix("reasoning_gym:").partition("?")
    name, _, split = name.partition(":")
    if split not in ("", "heldout"):
        raise ValueError(
            f"data source {source!r}: expected reasoning_gym:TASK or reasoning_gym:TASK:heldout, and then ?option=value"
        )
    task = f"{name}?{options}" if options else name
    if size < 1:
        raise ValueError(
            f"data source {source!r}: its problems are generated, so their number must be given (got {size})"
        )
    entries = ask_worker("entries", [task, size, seed, split or "train"], GYM_GENERATION_S)
    if entries is None:
        raise ValueError(
            f"data source {source!r}: {size} entries were not generated within {GYM_GENERATION_S:.0f} s"
        )
    return [
        Problem(
            id=f"{name}:{seed}:{index}",
            prompt=question,
            answer=answer,
            kind="gym",
            task=task,
            entry=(seed, index),
        )
        for index, question, answer in entries
    ]


def _problem(record: dict, where: str) -> Problem:
    if "nums" in record and "target" in record:  # Countdown-Tasks-3to4
        try:
            return _countdown_problem(tuple(map(int, record["nums"])), int(record["target"]))
        except (TypeError, ValueError):
            shown = f"nums = {record['nums']!r}, target = {record['target']!r}"
            raise ValueError(
                f"{where}: expected a list of integers and an integer, got {shown}"
            ) from None
    prompt, context = files.question(record, where)
    answer, tolerance = files.gold_answer(record, where)
    id_ = next(
        (record[name] for name in files.ID_FIELDS if record.get(name) is not None), Path(where).name
    )
    return Problem(
        id=str(id_), prompt=prompt, context=context, answer=answer, tolerance=tolerance, kind="math"
    )


def _subset(items: list, size: int, seed: int, source: str) -> list:
    if size > len(items):
        raise ValueError(f"data source {source}: {size} problems wanted, it holds {len(items)}")
    if size == 0:
        return items
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))[:size]]
