"""Problems and demonstrations: what the policy is asked, and which verifier judges the answer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np

from answers.equality import check_gold
from answers.symbolic import judge
from answers.workers import ask_worker
from config import Config, UserError
from data import countdown, files

GYM_GENERATION_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question. kind names its judge: "countdown" (numbers, target), "math" (answer,
    tolerance), or a reward function by its import path "module:function"."""

    id: str
    prompt: str  # the question, without the prompt template
    answer: str  # "" if it is not readable and a reward function judges
    kind: str
    numbers: tuple[int, ...] = ()
    target: int = 0
    tolerance: float = 0.0  # absolute
    fields: Mapping[str, object] = field(default_factory=dict, hash=False)  # the whole record
    context: tuple[tuple[str, str], ...] = ()  # (role, content) of the messages before the question


def load_problems(source: str, *, size: int = 0, seed: int = 0, reward: str = "") -> list[Problem]:
    """Problems of a source, each question once, the same for the same arguments.

    source: "countdown:train", "countdown:heldout" or "countdown:search", with options as in
    "countdown:train?numbers=4&max=20" (defaults 3 and 20); "reasoning_gym:TASK" or
    "reasoning_gym:TASK:heldout", with the task's own options; or a .jsonl, .json, .csv or .parquet
    file. Generated splits share no question. size: how many, drawn by seed; 0 = the whole file.
    reward: import path of the function that judges instead of the source's own judge; then no gold
    answer is needed. Prints how many repeated and contradicting questions it leaves out. Raises
    UserError for a bad source or size, a broken record, or an unreadable gold answer.
    """
    if source.startswith("countdown:"):
        split, options = _countdown_source(source, size)
        games = countdown.generate_games(split, size=size, seed=seed, **options)
        problems = [_countdown_problem(numbers, target, {}) for numbers, target in games]
    elif source.startswith("reasoning_gym:"):
        problems = _gym_problems(source, size, seed)
    else:
        problems = _subset(_file_problems(source, reward), size, seed, source)
    return [replace(problem, kind=reward or problem.kind) for problem in problems]


def load_demonstrations(source: str, *, size: int = 0, seed: int = 0) -> list[tuple[str, str]]:
    """(question, response) pairs to imitate.

    source: "countdown:skills" or "countdown:habit", with options as in load_problems; or a file
    with the fields problem and response.
    """
    if source.startswith("countdown:"):
        stage, options = _countdown_source(source, size)
        demos = countdown.generate_demonstrations(stage, size=size, seed=seed, **options)
        return [(countdown.question(numbers, target), steps) for numbers, target, steps in demos]
    pairs = []
    for record, where in files.read_records(source):
        text, context = files.question(record, where)
        if context:
            raise UserError(f"{where}: {len(context)} messages before the question; expected none")
        pairs.append((text, files.text_of(record, ("response",), where)))
    return _subset(pairs, size, seed, source)


def load_data(cfg: Config, tokenizer=None) -> tuple[list[Problem], list[Problem]]:
    """Training problems, drawn by cfg.seed, and held-out problems, the same for every seed.

    Raises UserError as load_problems does, for a held-out question among the training questions,
    and for a question that the tokenizer or its chat template does not take.
    """
    data, train = cfg.data, []
    heldout = load_problems(data.eval, size=data.eval_size, seed=0, reward=data.reward)
    if cfg.method not in ("eval", "sft"):
        train = load_problems(data.train, size=data.train_size, seed=cfg.seed, reward=data.reward)
    trained = {question_key(problem) for problem in train}
    shared = [problem for problem in heldout if question_key(problem) in trained]
    if shared:
        count = f"{len(shared)} of {len(heldout)} questions of data.eval"
        first = f"{shared[0].id!r} ({shared[0].prompt[:60]!r})"
        raise UserError(f"{count} are also in data.train, the first is {first}")
    for problem in train + heldout if tokenizer is not None else []:
        try:
            tokenizer.encode_prompt(problem.prompt, data, problem.context)
        except UserError as error:
            raise UserError(f"problem {problem.id!r}: {error}") from None
    return train, heldout


def next_problems(problems: list[Problem], drawn: int, count: int, seed: int, successes=None):
    """count problems of the endless stream, from position drawn on. Each pass over the problems
    is a permutation of its own, seeded by (seed, pass). Where some have successes (their number by
    Problem.id), problems are drawn instead, with chances of 1 / (1 + successes)."""
    if successes:
        chance = np.array([1 / (1 + successes.get(p.id, 0)) for p in problems])
        repeat, rng = count > len(problems), np.random.default_rng((seed, drawn))
        chosen = rng.choice(len(problems), count, replace=repeat, p=chance / chance.sum())
        return [problems[i] for i in chosen]
    passes = range(drawn // len(problems), (drawn + count) // len(problems) + 1)
    orders = [np.random.default_rng((seed, p)).permutation(len(problems)) for p in passes]
    start = drawn % len(problems)
    return [problems[i] for i in np.concatenate(orders)[start : start + count]]


def question_key(problem: Problem) -> str:
    """Equal for equal questions: the whole conversation with its white space folded; of Countdown
    the numbers in any order and the target."""
    if problem.numbers:
        return f"countdown:{sorted(problem.numbers)}->{problem.target}"
    texts = [text for message in problem.context for text in message] + [problem.prompt]
    return "\n".join(" ".join(text.split()) for text in texts)


def _generated_source(source: str, size: int) -> tuple[str, str]:
    """Name and options of a generated source "FAMILY:NAME?OPTIONS"."""
    if size < 1:
        raise UserError(f"data source {source!r}: is generated, so its size must be given")
    name, _, options = source.partition(":")[2].partition("?")
    return name, options


def _countdown_source(source: str, size: int) -> tuple[str, dict[str, int]]:
    """Split or stage of a Countdown source, and its options as countdown.py names them."""
    name, query = _generated_source(source, size)
    options = {"numbers": "3", "max": "20"} | dict(parse_qsl(query, keep_blank_values=True))
    allowed = {"numbers": range(2, 9), "max": range(1, countdown.MAX_VALUE + 1)}
    for option, text in options.items():
        if not (text.isdecimal() and int(text) in allowed.get(option, ())):
            limits = f"numbers from 2 to 8 and max from 1 to {countdown.MAX_VALUE}"
            raise UserError(f"data source {source!r}: {option}={text}: the options are {limits}")
    return name, {"num_numbers": int(options["numbers"]), "max_number": int(options["max"])}


def _countdown_problem(numbers: tuple[int, ...], target: int, record: dict) -> Problem:
    id_ = f"countdown:{','.join(map(str, numbers))}->{target}"
    text = countdown.question(numbers, target)
    game = {"kind": "countdown", "numbers": numbers, "target": target, "fields": record}
    return Problem(id=id_, prompt=text, answer=str(target), **game)


def _gym_problems(source: str, size: int, seed: int) -> list[Problem]:
    name, options = _generated_source(source, size)
    name, _, split = name.partition(":")
    if split not in ("", "heldout"):
        raise UserError(f"data source {source!r}: expected reasoning_gym:TASK[:heldout][?options]")
    task = f"{name}?{options}" if options else name
    arguments, package = [task, size, seed, split or "train"], "reasoning_gym"
    entries = ask_worker("data.gym:entries", arguments, GYM_GENERATION_S, package)
    if entries is None:
        raise UserError(f"data source {source!r}: took longer than {GYM_GENERATION_S:.0f} s")
    return [Problem(**entry) for entry in entries]


def _file_problems(source: str, reward: str) -> list[Problem]:
    """Each question of a file once, but none whose answers contradict each other."""
    problems: dict[str, Problem] = {}  # by question_key
    key_of_id: dict[str, str] = {}
    contradicted: dict[str, str] = {}  # question_key -> place
    unreadable, num_records = [], 0
    for record, where in files.read_records(source):
        num_records += 1
        problem = _problem(record, where, reward)
        try:
            if not reward:
                check_gold(problem.answer)
        except ValueError as error:
            unreadable.append(f"\n  {where}: {error}")
            continue
        key = question_key(problem)
        first = problems.setdefault(key, problem)
        if key_of_id.setdefault(first.id, key) != key:
            raise UserError(f"{where}: id {first.id!r} belongs to an earlier, different question")
        equal = reward or first.answer == problem.answer
        if not (equal or judge(first.answer, problem.answer) == "correct"):
            contradicted[key] = where
    if unreadable:
        raise UserError(
            f"{source}: {len(unreadable)} of {num_records} gold answers are unreadable; correct or "
            f"remove these records, of which at most 20 are shown:{''.join(unreadable[:20])}"
        )
    if num_records > len(problems):
        print(f"{source}: {num_records} records, of which {len(problems)} are different questions")
    if contradicted:
        place = next(iter(contradicted.values()))
        count = f"{len(contradicted)} questions with contradicting answers"
        print(f"{source}: {count} are left out, the first at {place}")
    return [problem for key, problem in problems.items() if key not in contradicted]


def _problem(record: dict, where: str, reward: str) -> Problem:
    if "nums" in record and "target" in record:  # Countdown-Tasks-3to4
        nums, target = record["nums"], record["target"]
        try:
            nums = json.loads(nums) if isinstance(nums, str) else nums  # as CSV holds a list
            if not (isinstance(nums, list) and nums):
                raise ValueError
            *numbers, target = [int(files.text_of({"": n}, ("",), where)) for n in [*nums, target]]
            return _countdown_problem(tuple(numbers), target, record)
        except (ValueError, RecursionError):
            wanted = "a list of integers, and target an integer"
            raise files.field_error(where, "nums", wanted, (nums, target)) from None
    prompt, context = files.question(record, where)
    try:
        answer, tolerance = files.gold_answer(record, where)
    except UserError:
        if not reward:
            raise
        answer, tolerance = "", 0.0
    id_ = files.text_of(record | {"place": Path(where).name}, (*files.IDS, "place"), where)
    question = {"id": id_, "prompt": prompt, "context": context, "fields": record}
    return Problem(answer=answer, tolerance=tolerance, kind="math", **question)


def _subset(items: list, size: int, seed: int, source: str) -> list:
    """size items drawn by seed, or all of them for size 0."""
    if size > len(items):
        raise UserError(f"data source {source}: {size} items wanted, it holds {len(items)}")
    if size == 0:
        return items
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))[:size]]
