"""Countdown: make a target from numbers with + - * /, each number used exactly once.

A response is a derivation, one step for each operator: "3 + 5 = 8, 8 * 2 = 16". judge decides
whether it is right. Games, which + - * solve, are drawn by seed from four splits that share no
numbers: train, heldout, search (a held-out set for choosing settings) and demonstrations.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from answers.extract import extract_boxed, extract_tagged, final_part
from answers.latex import NotMath
from config import UserError

MAX_VALUE = 99  # of targets and intermediate results: every number up to it is one token
OPERATORS = "+-*"
# tenths of all sets of numbers
BUCKETS = {"heldout": (0, 1), "search": (2, 3), "train": (4, 5, 6), "demonstrations": (7, 8, 9)}
MAX_MISSES = 5_000  # derivations in a row without a new game: the split is exhausted

# What makes the embedded base policy like an LLM before RL (ours): it learns the skills, then
# habits of order and of addition. Share of demonstrations whose target is another game's, share of
# derivations that combine the first two numbers first, operators to draw from.
STAGES = {"skills": (0.3, 0.0, OPERATORS), "habit": (1.0, 0.9, "++++++++-*")}

Game = tuple[tuple[int, ...], int]  # numbers, target


def question(numbers: tuple[int, ...], target: int) -> str:
    return f"make {target} from {' '.join(map(str, numbers))}:"


def split_of(numbers: tuple[int, ...]) -> str:
    """The split a set of numbers belongs to, by a hash: the same for every order, seed and size."""
    digest = hashlib.sha256(",".join(map(str, sorted(numbers))).encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 10
    return next(split for split, buckets in BUCKETS.items() if bucket in buckets)


def _derivations(
    split: str, seed: int, num_numbers: int, max_number: int, habits: tuple = (0.0, OPERATORS)
) -> Iterator[tuple]:
    """Endless random (numbers, target, steps) of a split. Two random numbers of the board, or its
    first two in a share of the derivations, are combined until one is left, all in 0..MAX_VALUE."""
    in_order_share, operators = habits
    rng = np.random.default_rng((seed, *split.encode()))
    while True:
        numbers = tuple(int(n) for n in rng.integers(1, max_number + 1, size=num_numbers))
        if split_of(numbers) != split:
            continue
        in_order = rng.random() < in_order_share
        board, steps = list(numbers), []
        while len(board) > 1 and 0 <= board[0] <= MAX_VALUE:
            pair = [board.pop(0 if in_order else int(rng.integers(len(board)))) for _ in range(2)]
            a, b = pair if rng.random() < 0.5 else pair[::-1]
            operator = operators[rng.integers(len(operators))]
            value = {"+": a + b, "-": a - b, "*": a * b}[operator]
            steps.append(f"{a} {operator} {b} = {value}")
            board.insert(0, value)
        if len(board) == 1 and 0 < board[0] <= MAX_VALUE:
            yield numbers, board[0], ", ".join(steps)


def generate_games(
    split: str, *, size: int, seed: int, num_numbers: int, max_number: int
) -> list[Game]:
    """size different solvable games of a split, drawn by seed.

    Games that plain addition solves are left out: they need no search. Raises UserError for an
    unknown split, and when the split holds too few games.
    """
    if split not in BUCKETS:
        raise UserError(f"countdown:{split}: unknown split; expected one of {', '.join(BUCKETS)}")
    games: dict[tuple, Game] = {}
    misses = 0
    for numbers, target, _ in _derivations(split, seed, num_numbers, max_number):
        key = (tuple(sorted(numbers)), target)
        if sum(numbers) == target or key in games:
            misses += 1
            if misses > MAX_MISSES:
                found = f"only {len(games)} games of {num_numbers} numbers up to {max_number} found"
                raise UserError(f"countdown:{split}: {found}, {size} wanted")
            continue
        games[key] = (numbers, target)
        misses = 0
        if len(games) == size:
            return list(games.values())


def generate_demonstrations(
    stage: str, *, size: int, seed: int, num_numbers: int, max_number: int
) -> list[tuple[tuple[int, ...], int, str]]:
    """size (numbers, target, steps) of a stage of STAGES.

    The arithmetic is right, a share of the targets swapped. Raises UserError for an unknown stage.
    """
    if stage not in STAGES:
        stages = " or countdown:".join(STAGES)
        raise UserError(f"demonstrations 'countdown:{stage}': expected countdown:{stages}")
    wrong_target_share, *habits = STAGES[stage]
    source = _derivations("demonstrations", seed, num_numbers, max_number, habits)
    demos = [next(source) for _ in range(size)]
    rng = np.random.default_rng((seed, 1))
    wrong = np.flatnonzero(rng.random(size) < wrong_target_share)
    swapped = list(demos)
    for i, j in zip(wrong, rng.permutation(wrong), strict=True):
        swapped[i] = (demos[i][0], demos[j][1], demos[i][2])
    return swapped


# ---- the judge ----

MAX_CHARS = 1000
MAX_BRACKETS = 50
MAX_DIGITS = 30

_LEAD_IN = re.compile(r"^.*(?::|\banswer is\b|\bexpression is\b|<answer>)[*\s]*(?=.)")
_INLINE_MATH = re.compile(r"\\\(([^$\n]*?)\\\)|\$([^$\n]+)\$")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\\[dt]?frac|\n|[^ \t\r]")
_SIGNS = str.maketrans("×✕⋅·∙÷−–xX{}[]", "*****/--**()()")
_LATEX = re.compile(r"\\(?:left|right|displaystyle|[()\[\],;:!]|text\s*\{\s*\})|\\(?=[{}])")
_COMMANDS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\\\", "\n"))


def judge(response: str, numbers: Sequence[int], target: int | Fraction) -> tuple[str, str | None]:
    """("correct" | "wrong" | "unparsable" | "no_answer", the text that was judged).

    A derivation uses each number exactly once, with + - * / and parentheses. It is played on a
    board: that starts as the given numbers; each step takes its numbers off the board and puts its
    value on it, and at the end the board must hold the target alone.

        answer := step (("," | ";" | newline) step)*
        step   := (number "=")? expr ("=" expr)*        a stated value must be exactly right
        expr   := term (("+" | "-") term)*              term   := factor (("*" | "/") factor)*
        factor := number | "(" expr ")" | "\\frac" factor factor      2(3 + 5) is a product, too

    Of what stands behind </think> the last <answer>...</answer> is judged, or else the last
    \\boxed{}, or else all of it, or else its last line. Values are exact; division by zero is
    "wrong". There is no unary minus: "-2" must be on the board first.
    """
    response = final_part(response).replace("\\boxed{}", "")
    marked = extract_tagged(response)
    marked = extract_boxed(response if marked is None else marked) or marked
    response = response if marked is None else marked
    reason, text = _judged(response, numbers, target)
    if reason in ("correct", "no_answer"):
        return reason, text
    last_line = response.strip("`\n\t ").rpartition("\n")[2][-MAX_CHARS:]
    if marked is None:
        last_line = _LEAD_IN.sub("", last_line, count=1)
        formulas = _INLINE_MATH.findall(last_line)
        last_line = max(formulas[-1]) if formulas else last_line
    return _judged(last_line, numbers, target)


def _judged(text: str, numbers: Sequence[int], target: int | Fraction) -> tuple[str, str | None]:
    text = text.strip(" ,;\n\t")
    if not text:
        return "no_answer", None
    if len(text) > MAX_CHARS or sum(map(text.count, "([{")) > MAX_BRACKETS:
        return "unparsable", text[:MAX_CHARS]
    derivation = _Derivation(_tokens(text), numbers)
    try:
        derivation.run()
    except NotMath:
        return "unparsable", text
    is_correct = derivation.valid and derivation.board == [target]
    return "correct" if is_correct else "wrong", text


def _tokens(text: str) -> list[str]:
    if "\\" in text:
        for latex, sign in _COMMANDS:
            text = text.replace(latex, sign)
        text = _LATEX.sub(" ", text)
    text = text.rstrip("$`. \n").lstrip("$` \n")
    text = re.sub(r"(?s)^\*\*(.*)\*\*$", r"\1", text)  # bold in Markdown
    return _TOKEN.findall(text.translate(_SIGNS))


class _Derivation:
    """Recursive descent over the tokens, which evaluates as it reads.

    valid turns False at a number that is not on the board, a wrongly stated value or a division by
    zero; a syntax error raises NotMath."""

    def __init__(self, tokens: list[str], numbers: Sequence[int]):
        self.tokens = [*tokens, "", ""]
        self.position = 0
        self.board = list(numbers)
        self.valid = True

    def run(self) -> None:
        while True:
            while self.tokens[self.position] in (",", ";", "\n"):
                self.position += 1
            if not self.tokens[self.position]:
                return
            first, second = self.tokens[self.position : self.position + 2]
            is_stated = second == "=" and first not in map(str, self.board)  # 16 = 8 * 2
            values = [self.expression(takes=not is_stated)]
            while self.tokens[self.position] == "=":
                self.position += 1
                values.append(self.expression(takes=is_stated and len(values) == 1))
            self.valid &= len(set(values)) == 1
            if self.tokens[self.position] not in ("", ",", ";", "\n"):
                raise NotMath
            self.board.append(values[0])

    def expression(self, takes: bool) -> int | Fraction:
        value = self.term(takes)
        while (operator := self.tokens[self.position]) in ("+", "-"):
            self.position += 1
            other = self.term(takes)
            value = value + other if operator == "+" else value - other
        return value

    def term(self, takes: bool) -> int | Fraction:
        value = self.factor(takes)
        while (operator := self.tokens[self.position]) in ("*", "/", "("):
            self.position += operator != "("  # 2(3 + 5)
            other = self.factor(takes)
            value = self.quotient(value, other) if operator == "/" else value * other
        return value

    def factor(self, takes: bool) -> int | Fraction:
        token = self.tokens[self.position]
        self.position += 1
        if token[:1].isdecimal():
            return self.number(token, takes)
        if token == "-" and self.tokens[self.position][:1].isdecimal():
            self.position += 1
            return self.number("-" + self.tokens[self.position - 1], takes)
        if token == "(":
            value = self.expression(takes)
            if self.tokens[self.position] != ")":
                raise NotMath
            self.position += 1
            return value
        if token.endswith("frac"):
            if self.tokens[self.position] != "(":
                raise NotMath
            numerator = self.factor(takes)
            return self.quotient(numerator, self.factor(takes))
        raise NotMath

    def number(self, token: str, takes: bool) -> int | Fraction:
        if len(token) > MAX_DIGITS:
            raise NotMath
        value = Fraction(token) if "." in token else int(token)
        if takes:
            try:
                self.board.remove(value)
            except ValueError:
                self.valid = False
        return value

    def quotient(self, value: int | Fraction, other: int | Fraction) -> int | Fraction:
        if other == 0:
            self.valid = False
            return 0
        return Fraction(value) / other
