"""Strings in, verdict out: what a response answers, and whether that is right.

verify(problem, response) chooses by problem.kind: "countdown" (each number used exactly once makes the target), "math" (equal to the
gold answer, equality.py) or "gym" (the scorer of a reasoning-gym task, data/gym.py, in a worker process). For the first two, text is only
ever parsed by code of this project: no eval, exec, sympify or parse_expr.
"""

import atexit
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import equality
from latex import NotMath, TooHard

MAX_WORKERS = min(8, os.cpu_count() or 1)
GYM_START_S = 30.0  # a worker process that first imports reasoning-gym gets so much more time


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str  # "correct" | "wrong" | "no_answer" | "unparsable" | "timeout"
    answer: str | None = None  # the text that was judged


def verify(problem, response: str, timeout_s: float = 5.0) -> Verdict:
    """The verdict by problem.kind: "countdown" reads problem.numbers and .target, "math" .answer and .tolerance, "gym" .task and .entry."""
    return verify_many([problem], [response], timeout_s)[0]


def verify_many(
    problems: Sequence,
    responses: Sequence[str],
    timeout_s: float = 5.0,
    num_workers: int = MAX_WORKERS,
) -> list[Verdict]:
    """One verdict for each (problem, response), in order.

    What the bounded code here decides (all of Countdown, nearly all of mathematics: well below a millisecond each) is decided in this
    process; sympy and the scorers of reasoning-gym run in up to num_workers worker processes at once, timeout_s for each.
    """
    verdicts = [
        _verify_here(problem, response)
        for problem, response in zip(problems, responses, strict=True)
    ]
    undecided = [i for i, verdict in enumerate(verdicts) if verdict.reason == "undecided"]
    if undecided:
        with ThreadPoolExecutor(max(1, min(num_workers, len(undecided)))) as pool:
            reasons = pool.map(
                lambda i: _verify_in_worker(problems[i], verdicts[i].answer, timeout_s), undecided
            )
            for i, reason in zip(undecided, reasons, strict=True):
                verdicts[i] = Verdict(reason == "correct", reason, verdicts[i].answer)
    return verdicts


def _verify_here(problem, response: str) -> Verdict:
    if problem.kind == "countdown":
        return verify_countdown(response, problem.numbers, problem.target)
    if problem.kind == "gym":
        return Verdict(False, "undecided" if response.strip() else "no_answer", response)
    if problem.kind != "math":
        raise ValueError(
            f"problem {problem.id!r}: kind {problem.kind!r} has no verifier; expected 'countdown', 'math' or 'gym'"
        )
    answer = extract_answer(response)
    if answer is None:
        return Verdict(False, "no_answer")
    reason = _compare(problem.answer, answer, problem.tolerance)
    return Verdict(reason == "correct", reason, answer)


def _verify_in_worker(problem, answer: str, timeout_s: float) -> str:
    if problem.kind == "math":
        return ask_worker("compare", [problem.answer, answer], timeout_s) or "timeout"
    # what is marked as the answer, or else the whole response, or else its final answer in words
    marked = extract_tagged(answer) or extract_boxed(answer)
    candidates = (
        [marked] if marked else dict.fromkeys([answer.strip(), extract_answer(answer) or ""])
    )
    score = ask_worker(
        "score", [problem.task, *problem.entry, list(candidates)], timeout_s, start_s=GYM_START_S
    )
    return "timeout" if score is None else "correct" if score == 1.0 else "wrong"


# ---- extraction ----

MAX_SENTENCE = 1000
TAIL_CHARS = 4000  # of the response in which formulas and numbers without a marker are looked for
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\[{}\\]|[{}]")
_CUT_OFF_BOX = re.compile(r"\\boxed\s*\{(?!\s*\})")
_BOX_JOINER = re.compile(
    r"[\s$.\\()\[\]]*(?:,|;|\\text\s*\{|\\quad|and\b|or\b|\\ |[\s}$])*(?<=[,;\s$}dr])[\s$\\()\[\]]*"
)
_PERCENT_BEHIND = re.compile(r"\s*(?:\$|\\\)|\\\])?\s*(?:\\?%|percent\b|pct\b)")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_PHRASE = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice))\b\**(?:\s+to\s[^.\n:]{0,80}?)?"
    r"(?:\s{1,9}(?:is|are)\b|\s{0,9}[:=])(?:\s*:)?|<answer>",
    re.IGNORECASE,
)  # an unclosed tag: generation stopped at </answer>
_ADVERB = re.compile(r"(?:therefore|thus|hence|then|simply|just|clearly|indeed)\b[,:\s]*")
_IS_THE_ANSWER = re.compile(
    r"(\$[^$\n]{1,200}\$|(?<![\w.,])-?\d[\d.,/]*\s?\\?%?|\b[A-J]\b)\)?\s+is\s+(?:the|our|my)\s+(?:final\s+|correct\s+|right\s+)?answer\b"
)
_CHOICE = re.compile(r"\b(?:option|choice|choose|select|pick)\s+\(?([A-J])\b(?!')")
_ONLY_CHOICE = re.compile(r"[\s*(\\$]*([A-J])[\s*).\\$]*")
_END_OF_TEXT = re.compile(r"(?:\s*(?:<\|\w{1,20}\|>|</s>))+\s*$")
_AFTERTHOUGHT = re.compile(
    r"(?:,?\s+(?:which|where|because|since|so|when|if|as)\b|\s+\([^()$\\]*[a-z]{3,}\s[^()$\\]*\)$)"
)
_FORMULA_JOINER = re.compile(r"\s*(?:,|;|,?\s*and|,?\s*or)\s*")
_VERB = re.compile(r"\s(?:is|are|equals)\s+")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|\n")
_DISPLAY = re.compile(r"\\\[(.{1,2000}?)\\\]|\\\((.{1,2000}?)\\\)|\$\$(.{1,2000}?)\$\$", re.DOTALL)
_DOLLAR = re.compile(r"(?<!\\)\$")
_PROSE = re.compile(r"(?<![\\A-Za-z{])(?!sin|cos|tan|log|and|mod)[A-Za-z]?[a-z]{2,}")
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)])[-−])?(?<![A-Za-z_\d.,])(?:\d+ \d+/\d+|\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?|\.\d+)"
    r"(?:\^\d+)?(?:\s?π)?(?:\s?\\?%)?(?: or \d+)?"
)


def extract_answer(text: str) -> str | None:
    """The text of the final answer, or None. In this order, the last of its kind winning: <answer>x</answer>; \\boxed{x}, or several
    joined by and / or / comma; `#### x`; "answer is x" / "Answer: x"; "x is the answer"; the last formula or number, whichever comes later;
    the letter of a choice."""
    text = text[:-100] + _END_OF_TEXT.sub("", text[-100:])
    tagged = extract_tagged(text)
    if tagged is not None:
        return extract_boxed(tagged) or _behind_phrase(tagged) or tagged or None
    boxed = extract_boxed(text)
    if boxed or _CUT_OFF_BOX.search(text):  # "\\boxed{4" may have been going to be 42
        return boxed or None
    hashes = text.rfind("####")
    found = _HASHES.match(text, hashes) if hashes >= 0 else None
    if found:
        return found[1].strip().strip("*").strip() or None
    return (
        _behind_phrase(text)
        or _before_phrase(text[-TAIL_CHARS:])
        or _last_formula(text[-TAIL_CHARS:])
        or _chosen(text[-TAIL_CHARS:])
    )


def extract_tagged(text: str) -> str | None:
    """What stands in the last <answer>...</answer>, or None."""
    for tag in ("answer>", "ANSWER>", "Answer>"):
        end = text.rfind("</" + tag)
        start = text.rfind("<" + tag, 0, end) if end >= 0 else -1
        if start >= 0:
            return text[start + 1 + len(tag) : end].strip()
    return None


def extract_boxed(text: str) -> str | None:
    """What the last closed \\boxed{...} holds, braces nested to any depth, with the boxes joined to it by and / or / comma; or None.

    A percent sign right behind the box belongs to it."""
    if "box" not in text:
        return None
    boxes = [box for box in _boxes(text) if text[box[1] : box[2]].strip()]
    if not boxes:
        bare = re.findall(r"\\boxed\s*([^\s{}$\\.,]+)", text)
        return bare[-1] if bare else None
    boxes.sort()
    contents = [text[boxes[-1][1] : boxes[-1][2]].strip()]
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[before[2] + 1 : after[0]]
        if (
            len(between) > 40
            or not re.search(r"[,;]|\band\b|\bor\b", between)
            or not _BOX_JOINER.fullmatch(between)
        ):
            break
        contents.append(text[before[1] : before[2]].strip())
    percent = "\\%" if len(contents) == 1 and _PERCENT_BEHIND.match(text, boxes[-1][2] + 1) else ""
    return ", ".join(dict.fromkeys(reversed(contents))) + (
        percent if "%" not in contents[0] else ""
    )


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start of the command, start and end of the content) of every closed \\boxed{}."""
    open_braces, boxes = [], []
    for mark in _BRACES.finditer(text):
        if mark.group() == "}":
            opened = open_braces.pop() if open_braces else None
            if opened:
                boxes.append((*opened, mark.start()))
        elif mark.group() == "{":
            open_braces.append(None)
        elif mark.group()[1].isalpha():
            open_braces.append((mark.start(), mark.end()))
    return boxes


def _behind_phrase(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:", up to the end of the sentence; of a sentence with words, its first formula."""
    found = None
    for found in _PHRASE.finditer(text):  # noqa: B007  the last
        pass
    if found is None:
        return None
    rest = text[found.end() : found.end() + TAIL_CHARS].lstrip(" \t\n:*#_")
    adverb = _ADVERB.match(rest)
    rest = rest[adverb.end() :] if adverb else rest
    display = _DISPLAY.match(rest)
    if display and not re.match(r"\s*(?:,|and\b|or\b)", rest[display.end() :]):
        return max(display.groups(""), key=len).strip() or None
    end = _SENTENCE_END.search(rest)
    sentence = (rest[: end.start()] if end else rest)[:MAX_SENTENCE].strip(' *_`"')
    letter = re.match(r"\(?([A-J])\)?,?\s+(?!and\b|or\b)[a-z]{2,}", sentence)
    return (letter[1] if letter else _without_prose(sentence)) or None


def _before_phrase(text: str) -> str | None:
    """42 of "42 is the answer"."""
    found = _IS_THE_ANSWER.findall(text)
    return found[-1].strip() if found else None


def _chosen(text: str) -> str | None:
    only = _ONLY_CHOICE.fullmatch(text)
    chosen = [only[1]] if only else _CHOICE.findall(text)
    return chosen[-1] if chosen else None


def _without_prose(sentence: str) -> str:
    """Of "the largest n is 34" the 34, of "$x$ where $x=5$" the first formula; formulas joined by "and" stay together."""
    sentence = (
        _AFTERTHOUGHT.split(sentence, maxsplit=1)[0]
        if not sentence.startswith(("where", "if", "when"))
        else sentence
    )
    formulas = _formulas(sentence)
    outside = sentence
    for _, start, end in reversed(formulas):
        outside = outside[:start] + outside[end:]
    if formulas and not re.fullmatch(
        r"[\s,;.$]*(?:(?:and|or)[\s,;.$]*)*(?:\\?%|[A-Za-z]{1,12}\s?[\^\d]*|percent|pct)?[\s,.]*",
        outside,
    ):
        values = _VERB.split(sentence)[1:]
        return (
            _without_prose(values[-1])
            if values and not sentence.startswith(("$", "\\("))
            else _groups(sentence)[0][0]
        )
    if formulas:
        return sentence
    subject, *values = _VERB.split(sentence)
    if values and re.search(r"[a-z]{2}", subject):
        return _without_prose(values[-1])
    lead_in = re.match(r"(?:[A-Za-z']{2,}[\s,:]+)+(?=[-−\d\\(\[√π.]*[\d\\√π])", sentence)
    return sentence[lead_in.end() :] if lead_in else sentence


def _last_formula(text: str) -> str | None:
    """The last LaTeX formula or the last number, whichever comes later; a formula without digits gives way to a number."""
    formula, formula_end = _groups(text)[-1] if "$" in text or "\\" in text else ("", 0)
    behind = None
    for behind in _LAST_NUMBER.finditer(text, formula_end):  # noqa: B007  the last
        pass
    if behind:
        return behind.group().rstrip(",").strip()
    if formula and (any(c.isdigit() for c in formula) or len(formula) > 2):
        return formula
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1].rstrip(",").strip() if numbers else formula or None


def _groups(text: str) -> list[tuple[str, int]]:
    """(content, end) of the formulas, those joined by "and", "or" or a comma taken together; [("", 0)] without any."""
    groups: list[tuple[str, int]] = [("", 0)]
    for content, start, end in _formulas(text):
        if groups[-1][0] and _FORMULA_JOINER.fullmatch(text, groups[-1][1], start):
            groups[-1] = (f"{groups[-1][0]}, {content}", end)
        else:
            groups.append((content, end))
    return groups[1:] or groups


def _formulas(text: str) -> list[tuple[str, int, int]]:
    """(content, start, end) of what stands between maths delimiters. A dollar sign before an amount of money is none."""
    found = [
        (max(m.groups(""), key=len).strip(), m.start(), m.end()) for m in _DISPLAY.finditer(text)
    ]
    dollars = [m.start() for m in _DOLLAR.finditer(text)]
    i = 0
    while i + 1 < len(dollars):
        start, end = dollars[i], dollars[i + 1]
        content = text[start + 1 : end]
        bare = re.sub(r"\\[a-zA-Z]+\s*(?:\{[^{}]*\})?", "", content)
        if content.strip() and "\n" not in content.strip("\n") and not _PROSE.search(bare):
            found.append((content.strip(), start, end + 1))
            i += 2
        else:
            i += 1
    return sorted((f for f in found if f[0]), key=lambda f: f[2])


# ---- mathematics ----


def verify_math(
    response: str, gold: str, timeout_s: float = 5.0, *, tolerance: float = 0.0
) -> Verdict:
    """Does the response's final answer equal gold, or differ from it by an absolute tolerance at most?"""
    answer = extract_answer(response)
    return (
        Verdict(False, "no_answer")
        if answer is None
        else answers_match(gold, answer, timeout_s, tolerance=tolerance)
    )


def _compare(gold: str, answer: str, tolerance: float = 0.0) -> str:
    gold, answer = extract_boxed(gold) or gold, extract_boxed(answer) or answer
    return (
        "correct"
        if tolerance and equality.within(gold, answer, tolerance)
        else equality.compare(gold, answer)
    )


def answers_match(
    gold: str, answer: str, timeout_s: float = 5.0, *, tolerance: float = 0.0
) -> Verdict:
    """Is the answer equal to gold? In this order: the same tree; exact numbers; structure (tuple, set, interval, list, matrix, equation,
    inequality, units); equal numbers at random points; sympy, for integrals and infinite series, in a worker that is killed at timeout_s.
    Before all that, a number within an absolute tolerance of gold, if there is one. An unparsable gold is never a reward."""
    reason = _compare(gold, answer, tolerance)
    if reason == "undecided":
        reason = ask_worker("compare", [gold, answer], timeout_s) or "timeout"
    return Verdict(reason == "correct", reason, answer)


def check_gold(gold: str) -> None:
    """Raises ValueError when gold cannot be read as an answer: nothing could ever be right."""
    try:
        equality.read(extract_boxed(gold) or gold)
    except NotMath as error:
        raise ValueError(f"gold answer {gold[:80]!r} cannot be read: {error}") from None


# ---- Countdown ----

MAX_COUNTDOWN_CHARS = 1000
MAX_COUNTDOWN_DEPTH = 50
MAX_COUNTDOWN_DIGITS = 30

_LEAD_IN = re.compile(r".*(?::|\banswer is\b|\bexpression is\b|<answer>)[*\s]*(?=.)")
_INLINE_MATH = re.compile(r"\\\(([^$\n]*?)\\\)|\$([^$\n]+)\$")
_COUNTDOWN_TOKEN = re.compile(r"\d+(?:\.\d+)?|\\[dt]?frac|\n|[^ \t\r]")
_COUNTDOWN_SIGNS = str.maketrans("×✕⋅·∙÷−–xX{}[]", "*****/--**()()")
_COUNTDOWN_LATEX = re.compile(
    r"\\(?:left|right|displaystyle|[()\[\],;:!]|text\s*\{\s*\})|\\(?=[{}])"
)
_COUNTDOWN_OPERATORS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\\\", "\n"))


def verify_countdown(response: str, numbers: Sequence[int], target: int) -> Verdict:
    """Does the response make target from numbers, each used exactly once, with + - * / and parentheses?

    A board, as in the TV game: it starts as the given numbers; each step takes its numbers off the board and puts its value on it,
    and at the end the board must hold the target alone. "(3 + 5) * 2" is one step; "3 + 5 = 8, 8 * 2 = 16" is two.

        answer := step (("," | ";" | newline) step)*        step   := expr ("=" expr)*       a stated value must be exactly right
        expr   := term (("+" | "-") term)*                  term   := factor (("*" | "/") factor)*
        factor := number | "(" expr ")" | "\\frac" factor factor

    What stands in the last <answer>...</answer> is judged, or else in the last \\boxed{}, or else the whole response, or else (when that is
    no correct derivation) its last line. Values are exact; division by zero is "wrong". There is no unary minus, it is not one of the
    four operations: "-2" is a number that must be on the board, as it is after "3 - 5 = -2".
    """
    marked = extract_tagged(response)
    if marked is None:
        marked = extract_boxed(response)
    if marked is not None:
        return _judge_derivation(marked, numbers, target)
    verdict = _judge_derivation(response, numbers, target)
    if verdict.correct or verdict.reason == "no_answer":
        return verdict
    last_line = response.strip("`\n\t ").rpartition("\n")[2][-MAX_COUNTDOWN_CHARS:]
    lead_in = _LEAD_IN.match(last_line)
    last_line = last_line[lead_in.end() :] if lead_in else last_line
    formulas = _INLINE_MATH.findall(last_line)
    return _judge_derivation(max(formulas[-1]) if formulas else last_line, numbers, target)


def _judge_derivation(text: str, numbers: Sequence[int], target: int) -> Verdict:
    text = text.strip()
    if not text:
        return Verdict(False, "no_answer")
    if len(text) > MAX_COUNTDOWN_CHARS:
        return Verdict(False, "unparsable", text[:MAX_COUNTDOWN_CHARS])
    derivation = _Derivation(_countdown_tokens(text), numbers)
    try:
        derivation.run()
    except _NotADerivation:
        return Verdict(False, "unparsable", text)
    correct = derivation.valid and derivation.board == [target]
    return Verdict(correct, "correct" if correct else "wrong", text)


def _countdown_tokens(text: str) -> list[str]:
    if "\\" in text:
        for latex, sign in _COUNTDOWN_OPERATORS:
            text = text.replace(latex, sign)
        text = _COUNTDOWN_LATEX.sub(" ", text)
    if not text.isascii() or not text[-1].isdigit():
        text = text.strip("$`. \n")
        if text.startswith("**") and text.endswith("**"):  # bold in Markdown
            text = text[2:-2]
    return _COUNTDOWN_TOKEN.findall(text.translate(_COUNTDOWN_SIGNS))


class _NotADerivation(Exception):
    pass


class _Derivation:
    """Recursive descent over the tokens; evaluates as it reads. valid turns False at a number that is not on the board, a wrongly
    stated value or a division by zero; a syntax error raises _NotADerivation."""

    def __init__(self, tokens: list[str], numbers: Sequence[int]):
        self.tokens = [*tokens, ""]
        self.position = 0
        self.board = list(numbers)
        self.valid = True
        self.depth = 0

    def run(self) -> None:
        while True:
            while self.tokens[self.position] in (",", ";", "\n"):
                self.position += 1
            if not self.tokens[self.position]:
                return
            value = self.expression(takes=True)
            while self.tokens[self.position] == "=":
                self.position += 1
                if self.expression(takes=False) != value:
                    self.valid = False
            if self.tokens[self.position] not in ("", ",", ";", "\n"):
                raise _NotADerivation
            self.board.append(value)

    def expression(self, takes: bool) -> int | Fraction:
        value = self.term(takes)
        while (operator := self.tokens[self.position]) in ("+", "-"):
            self.position += 1
            other = self.term(takes)
            value = value + other if operator == "+" else value - other
        return value

    def term(self, takes: bool) -> int | Fraction:
        value = self.factor(takes)
        while (operator := self.tokens[self.position]) in ("*", "/"):
            self.position += 1
            other = self.factor(takes)
            value = value * other if operator == "*" else self.quotient(value, other)
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
            self.depth += 1
            if self.depth > MAX_COUNTDOWN_DEPTH:
                raise _NotADerivation
            value = self.expression(takes)
            if self.tokens[self.position] != ")":
                raise _NotADerivation
            self.position += 1
            self.depth -= 1
            return value
        if token.endswith("frac"):
            if self.tokens[self.position] != "(":
                raise _NotADerivation
            numerator = self.factor(takes)
            return self.quotient(numerator, self.factor(takes))
        raise _NotADerivation

    def number(self, token: str, takes: bool) -> int | Fraction:
        if len(token) > MAX_COUNTDOWN_DIGITS:
            raise _NotADerivation
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
        return (
            Fraction(value) / other
            if isinstance(value, Fraction) or isinstance(other, Fraction) or value % other
            else value // other
        )


# ---- worker processes: what sympy must decide, and reasoning-gym ----

WORKER_MEMORY = 2 * 1024**3  # bytes of address space


class _Worker:
    """A child process that answers one question at a time over pipes, and is killed when it does not answer in time."""

    def __init__(self):
        command = [sys.executable, os.path.abspath(__file__), "--worker"]
        environment = os.environ | {
            "PYTHONHASHSEED": "0"
        }  # some tasks of reasoning-gym depend on the order of sets
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, env=environment
        )
        self.owner = os.getpid()
        self.ready = False
        self.warm: set[str] = set()  # functions that it has answered

    def ask(self, function: str, arguments: list, timeout_s: float) -> str | None:
        """The answer, or None at the deadline."""
        deadline = time.monotonic() + timeout_s
        if not self.ready:
            if self._line(deadline) is None:
                return None
            self.ready = True
        self.process.stdin.write(json.dumps([function, arguments, timeout_s]).encode() + b"\n")
        self.process.stdin.flush()
        return self._line(deadline)

    def _line(self, deadline: float) -> str | None:
        remaining = deadline - time.monotonic()
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if remaining <= 0 or not poll.poll(remaining * 1000):
            return None
        line = self.process.stdout.readline()  # the child writes whole lines
        if not line:
            raise EOFError
        return line.decode()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


_idle: list[_Worker] = []
_workers_lock = threading.Lock()


def ask_worker(function: str, arguments: list, timeout_s: float, start_s: float = 0.0):
    """What a worker process answers: function is a key of _serve's table, arguments and answer are JSON. None when it does not answer in
    timeout_s (start_s longer from a process that has not answered yet). Safe to call from threads. Raises ValueError that the function
    raised."""
    with _workers_lock:
        while _idle and _idle[-1].owner != os.getpid():  # inherited through a fork: the parent's
            _idle.pop()
        worker = _idle.pop() if _idle else _Worker()
    try:
        line = worker.ask(
            function, arguments, timeout_s + (0.0 if function in worker.warm else start_s)
        )
    except (EOFError, BrokenPipeError):  # out of memory, or killed from outside
        worker.kill()
        return None
    if line is None and worker.ready:
        worker.kill()
        worker = _Worker()  # starts while the caller goes on
    with _workers_lock:
        _idle.append(worker)
    if line is None:
        return None
    worker.warm.add(function)
    answer, error = json.loads(line)
    if error is not None:
        raise ValueError(error)
    return answer


@atexit.register
def _stop_workers() -> None:
    with _workers_lock:
        while _idle:
            worker = _idle.pop()
            if worker.owner == os.getpid():
                worker.kill()


def _serve() -> None:
    """The worker process: reads [function, arguments, timeout_s] lines, writes [answer, error] lines; dies at the deadline even when
    orphaned."""
    import resource
    import signal

    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    equality.symbolic_equality = _sympy_equality
    import sympy  # noqa: F401  before the first deadline

    answers, sys.stdout = sys.stdout, sys.stderr  # what a scorer prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        function, arguments, timeout_s = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
        answer, error = None, None
        if function == "compare":
            try:
                answer = _compare(*arguments)
            except (
                Exception
            ):  # sympy raises anything; the verdict is then that equality was not shown
                answer = "wrong"
        else:
            from data import gym

            try:
                answer = {"score": gym.score, "entries": gym.entries}[function](*arguments)
            except ValueError as exception:
                error = str(exception)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps([answer, error]), file=answers, flush=True)


def _sympy_equality(gold: tuple, answer: tuple) -> bool:
    import sympy

    difference = _to_sympy(gold) - _to_sympy(answer)
    return bool(sympy.simplify(difference.doit()) == 0)


def _to_sympy(node: tuple):
    """The tree as a sympy expression, built by constructors, never from text."""
    import sympy

    kind, rest = node[0], node[1:]
    if kind == "num":
        return sympy.Rational(rest[0].numerator, rest[0].denominator)
    if kind == "var":
        return sympy.Symbol(rest[0])
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[rest[0]]
    if kind in ("add", "mul"):
        return (sympy.Add if kind == "add" else sympy.Mul)(*map(_to_sympy, rest[0]))
    if kind == "series":
        name, variable, low, high, body = rest
        symbol = sympy.Symbol(variable)
        bounds = symbol if low is None else (symbol, _to_sympy(low), _to_sympy(high))
        return {"sum": sympy.Sum, "prod": sympy.Product, "int": sympy.Integral}[name](
            _to_sympy(body), bounds
        )
    if kind == "fn":
        name, arguments = rest[0], [_to_sympy(n) for n in rest[1]]
        if name == "root":
            return sympy.root(arguments[0], arguments[1])
        names = {"ln": "log", "abs": "Abs", "ceil": "ceiling", "binom": "binomial"}
        return (
            getattr(sympy, names.get(name, name))(*arguments)
            if name in _SYMPY_FUNCTIONS
            else _refuse(name)
        )
    operations = {
        "inv": lambda x: 1 / x,
        "neg": lambda x: -x,
        "pow": lambda x, y: x**y,
        "pct": lambda x: x / 100,
    }
    return operations[kind](*map(_to_sympy, rest)) if kind in operations else _refuse(kind)


_SYMPY_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "ln", "log", "exp", "abs", "floor", "ceil",
    "binom", "factorial",
}  # fmt: skip


def _refuse(what: str):
    raise TooHard(f"{what} has no sympy form")


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
