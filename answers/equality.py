"""Are two mathematical answers equal? Nothing here runs sympy or executes text.

What counts as equal (a false accept is worse than a false reject):
    numbers      exact; a decimal stands for a number without finite decimal only when it is that
                 number rounded to 7 or more digits, or cut off there
    percent      9% is 0.09; the gold 9% also accepts 9, the gold 9 does not accept 9%
    units        a unit missing on one side is no difference, but a word that may change the number
                 is one; two must be the same, by any of its names; 90 degrees is 90 and pi/2
    order        (1, 2) is ordered, {1, 2} and the list 1, 2 are not; a repeated item counts
    (1, 2)       is a point, but also the open interval when the other side is one
    x = 5        is 5; it is not y = 5; a chain whose parts differ (x = 41 = 42) is nothing; of
                 10/3 ~ 3.3 the exact part counts
    equations    equal up to a constant factor, but 2x = 10 is not x = 5; inequalities as sets
    groups       x = 1, y = 2; x = 3, y = 4 is (1, 2), (3, 4); 12 (mod 7) is 5 (mod 7)
    functions    equal wherever both are real: 2 ln x is ln x^2, but |x| is not x
    1010_2       equals itself only, as do FF_{16} and 0.\\overline{3}
"""

import math
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

from answers.evaluation import (
    ROUNDING,
    SMALL,
    Budget,
    Evaluation,
    NoValue,
    contains,
    is_integer,
    real,
    variables,
    walk,
)
from answers.extract import extract_boxed
from answers.latex import FUNCTIONS, MAX_CHARS, WORD_SIGNS, NotMath, integer, parse

MAX_VARIABLES = 10
ROUNDED_DIGITS = 7  # so many significant digits, correctly rounded, stand for a number

_REALS = ("var", "mathbb R")
_INFINITY = ("const", "inf")
_MINUS = ("neg", _INFINITY)
_EVERYTHING = ("interval", _MINUS, _INFINITY, False, False)
_SIGNS = {"pm", "mp"}
_UNSURE = (1, "?")  # beside the unit that may be none


def compare(
    gold: str, answer: str, tolerance: float = 0.0, symbolic: Callable | None = None
) -> str:
    """The verdict's reason: "correct", "wrong", "unparsable" or "undecided". Never raises.

    tolerance: a number within this distance of gold is correct, too.
    symbolic: compares trees that contain integrals; without it, such a gold is "undecided".
    """
    if max(len(gold), len(answer)) > 4 * MAX_CHARS:
        return "unparsable"
    gold, answer = _unboxed(gold), _unboxed(answer)
    try:
        gold_node = read(gold)
        is_letter = gold_node[0] == "var" and gold_node[1].isupper()
        label = _LABELLED.match(answer) if is_letter else None  # (C) 42 for C
        answers = [read(label[1] if label else _LABEL.sub("", answer))]
        if not variables(gold_node) and _LETTER_UNIT.fullmatch(answer):  # 5 m for 5
            answers.append(read(_LETTER_UNIT.sub(r"\1 \\text{\2}\3", answer)))
    except NotMath:
        return "unparsable"
    try:
        if _is_question(gold_node, answers[0]):
            return "wrong"
        if symbolic is None and contains(gold_node, {"integral"}):
            return "undecided"
        is_same = any(_Comparison(symbolic, tolerance).same(gold_node, node) for node in answers)
        return "correct" if is_same else "wrong"
    except (ArithmeticError, ValueError, RecursionError):  # also what mpmath raises
        return "wrong"


_DOUBLED, _SINGLE = re.compile(r"\\\\[A-Za-z]{2,}"), re.compile(r"(?<!\\)\\(?!\\)")


def _unboxed(text: str) -> str:
    """The content of a box; backslashes doubled by an escape are made single."""
    if _DOUBLED.search(text) and not _SINGLE.search(text):
        text = text.replace("\\\\", "\\")
    if re.match(r"[\s$]{0,9}\\(?:boxed|fbox|framebox)", text) and (inner := extract_boxed(text)):
        is_whole = "".join(text.split()).rstrip("$.").endswith("".join(inner.split()) + "}")
        return inner if is_whole else text
    return text


def _is_question(gold: tuple, answer: tuple) -> bool:
    """17 * 23 (not 5 * 10), floor(sqrt(1000)) or an integral: an exercise, not its number."""
    if contains(answer, {"integral"}) and not contains(gold, {"integral"}):
        return True
    gold, answer = (node[1][-1] if node[0] == "rel" else node for node in (gold, answer))
    if gold[0] != "num":
        return False
    products = (node[1] for node in walk(answer) if node[0] == "mul")
    plain = ([p for p in parts if p[0] == "num" and abs(p[1]) not in (1, 10)] for parts in products)
    return _calls(answer, {"floor", "ceil"}) or any(len(numbers) > 1 for numbers in plain)


def check_gold(gold: str) -> None:
    """Raises ValueError when gold cannot be read as an answer: nothing could ever be right."""
    try:
        read(_unboxed(gold))
    except NotMath as error:
        raise ValueError(f"gold answer {gold[:80]!r} cannot be read: {error}") from None


# ---- reading ----

# a multiple-choice letter with its text, "(C) 42" or "C. 42"; and the label alone, to be dropped
_LABELLED = re.compile(
    r"[\s$]*(?:\\(?:text|textbf|mathrm|mathbf)\s?\{)?\(?([A-J])[).:]"
    r"(?!.*(?<!\w)[A-J](?:[).:,]|[\s}$]*$))[\s}.:~\\$]*"
    r"(?![-+*/^=_,\s}]|\\[ct])\S"
)
_LABEL = re.compile(
    r"^[\s$]*(?:\\(?:text|textbf|mathrm|mathbf)\s?\{\(?[A-E]\)\}|\([A-E]\))[\s~\\]+(?=[\d$\\-])"
)
_LETTER_UNIT = re.compile(r"(.*[\d)}])(?:\s|\\,|~|\$)+([msghLNJWV])((?:\^\d)?[$.]?)")
_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|hbox)\s?\{([^{}]*)\}"
)
_LEAD_IN = re.compile(
    r"\s*(?:\\text\{)?(?:the )?(?:final |correct )?"
    r"(?:answer(?: is\b|:)|(?:option|choice)\b(?= ?\}? ?\(?[A-J]\b)) ?\}? ?(?=.)",
    re.IGNORECASE,
)
_TIME = re.compile(r"(\d{1,2}(?::\d{2})?) ?([ap])\.?m")
_MATHS_WORDS = {*FUNCTIONS, *WORD_SIGNS}
_NOTHING = re.compile(r"none|empty set|no (?:real )?solutions?")
_ALL = {"all real numbers", "all reals", "real numbers"}


@lru_cache(maxsize=4096)  # the gold answer comes once for each sample of a group
def read(text: str) -> tuple:
    """The tree of an answer; words become ("text", words). Raises NotMath."""
    if len(text) > MAX_CHARS:
        raise NotMath(f"longer than {MAX_CHARS} characters")
    text = text[lead_in.end() :] if (lead_in := _LEAD_IN.match(text)) else text
    plain = " ".join(_COMMAND.sub(r" \1 ", text).replace("$", " ").replace("\\ ", " ").split())
    plain = plain.strip(" .,;:!\"'*`()[]{}")
    words = plain.casefold()
    if _is_words(plain):
        words = words.removeprefix("the ").removeprefix("an ").removeprefix("a ")
        is_nothing = _NOTHING.fullmatch(words)
        return ("set", ()) if is_nothing else _REALS if words in _ALL else ("text", words)
    if time := _TIME.fullmatch(words):
        return ("text", f"{time[1]} {time[2]}m")
    try:
        return parse(text)
    except NotMath:
        if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", words)) < 2:
            raise
        return ("text", re.sub(r"\s|\\(?:left|right)(?![a-z])", "", words))


def _is_words(text: str) -> bool:
    """Is this language, rather than variables and functions?"""
    if not re.fullmatch(r"[A-Za-z][A-Za-z' -]*", text):
        return False
    words = [word for word in text.split() if len(word) > 1 and word not in _MATHS_WORDS]
    return any(len(word) > 2 or word.lower() in ("no", "am", "pm") for word in words)


# ---- trees ----

_FUNCTION_NAMES = {*"fghFGHPEVTpqSaNy", "\\phi", "\\psi", "\\sigma", "\\tau"}


def _is_equation(node: tuple) -> bool:
    return node[0] == "rel" and node[2] == ("=",)


def _is_name(node: tuple) -> bool:
    """Something that an equation gives a value to: x, m_max, AB, f(2), (x, y), the area."""
    kind = node[0]
    if kind == "mul":
        first, *rest = node[1]
        is_call = first[0] == "var" and first[1] in _FUNCTION_NAMES and len(rest) == 1
        return all(map(_is_name, node[1])) or is_call and rest[0][0] != "inv"
    if kind in ("tuple", "ratio"):
        return all(map(_is_name, node[1]))
    return kind in ("var", "text") or kind == "inv" and _is_name(node[1])


def _groups(node: tuple) -> list[list[tuple]]:
    """The equations of each group of x = 1, y = 2; x = 3, y = 4, by name; [] for anything else."""
    if node[0] != "list" or not all(map(_is_equation, node[1])):
        return []
    names = {item[1][0] for item in node[1]}
    starts = range(0, len(node[1]), len(names))
    groups = [sorted(node[1][i : i + len(names)], key=str) for i in starts]
    is_whole = all({item[1][0] for item in group} == names for group in groups)
    return groups if is_whole and len(names) > 1 and all(map(_is_name, names)) else []


def _signed(node, sign: int):
    """The tree with every ± read as sign and every ∓ as its opposite."""
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] in _SIGNS:
        inner = _signed(node[1], sign)
        return inner if (sign > 0) == (node[0] == "pm") else ("neg", inner)
    return tuple(_signed(child, sign) for child in node)


def _items(node: tuple) -> list[tuple]:
    items = []
    for item in node[1] if node[0] in ("list", "set") else [node]:
        items += [_signed(item, 1), _signed(item, -1)] if contains(item, _SIGNS) else [item]
    return items


def _joined(node: tuple, other: tuple) -> tuple:
    """x = 1 and y = 2 is a list, x = 1 and x = 2 the list 1, 2, no set; x > 2 and x < 5 stays."""
    if node[0] != "both" or not any(map(_is_equation, node[1])):
        return node
    is_one = len({item[1][0] for item in node[1]}) == 1
    is_list = all(map(_is_equation, node[1])) and (not is_one or other[0] == "list")
    return ("list", node[1]) if is_list else ("text", "")


def _quantity(node: tuple) -> tuple[tuple, tuple]:
    """(value, unit)"""
    return node[1:] if node[0] == "unit" else (node, ())


# ---- the comparison ----


class _Comparison:
    """One verdict: its budget, and the comparison of integrals, if there is one."""

    def __init__(self, symbolic: Callable[[tuple, tuple], bool] | None, tolerance: float):
        self.budget = Budget()
        self.tolerance = tolerance
        self.symbolic = symbolic

    def value(self, node: tuple):
        return Evaluation(self.budget, {}).value(node)

    def same(self, gold: tuple, answer: tuple) -> bool:
        self.budget.spend(8)  # nested chains of equations would take exponential time
        if gold == answer or {gold, answer} == {_REALS, ("var", "R")}:
            return True
        gold, answer = _joined(gold, answer), _joined(answer, gold)
        kinds = {gold[0], answer[0]}
        if "text" in kinds:
            return False
        if _is_equation(gold) and _is_equation(answer) and self.proportional(gold, answer):
            return True
        groups, answer_groups = _groups(gold), _groups(answer)
        if groups and answer_groups:
            return self.matches(groups, answer_groups, self.all_same)
        if groups or answer_groups:
            return self.same_assignment(*((gold, answer) if groups else (answer, gold)))
        named, answer_named = self.named(gold), self.named(answer)
        if named or answer_named:
            return self.same_named(named or (None, gold), answer_named or (None, answer))
        if kinds & {"union", "both"}:
            return self.same_region(gold, answer)
        if kinds & {"list", "set"} or contains((gold, answer), _SIGNS):
            return self.same_collection(gold, answer)
        if kinds & {"interval", "rel"} or _REALS in (gold, answer):
            return self.same_region(gold, answer)
        if "mod" in kinds:
            return self.same_residue(gold, answer)
        if kinds & {"tuple", "matrix", "ratio", "minus"}:
            return len(kinds) == 1 and self.all_same(gold[1], answer[1])
        return self.same_quantity(gold, answer)

    def all_same(self, gold: Sequence, answer: Sequence, same: Callable | None = None) -> bool:
        """Item by item."""
        return len(gold) == len(answer) and all(map(same or self.same, gold, answer))

    def matches(self, gold: Sequence, answer: Sequence, same: Callable | None = None) -> bool:
        """In any order."""
        same, left = same or self.same, list(answer)
        for item in gold:
            i = next((i for i, other in enumerate(left) if same(item, other)), None)
            if i is None:
                return False
            del left[i]
        return not left

    def named(self, node: tuple) -> tuple[tuple, tuple | None] | None:
        """(name, value) of x = value, x in set, x = expr = value ~ decimal.

        value is None for a chain that contradicts itself (x = 41 = 42). None without a name."""
        if node[0] != "rel" or not set(node[2]) <= {"=", "~", "in"}:
            return None
        parts, operators = list(node[1]), list(node[2])
        if operators == ["="] and parts[1][0] == "var" and not variables(parts[0]):  # 5 = x
            parts.reverse()
        names = []
        while len(parts) > 1 and self.is_named_by(parts[0], parts[-1]):
            names.append(parts.pop(0))
            del operators[0]
        has_variables = any(map(variables, parts))
        if has_variables and not names or len(names) > 1 and parts[-1][0] == "var":  # x = y = z
            return None
        name = names[0] if names else ("text", "=")
        constants = [part for part in parts if not variables(part)]
        if "~" in operators:
            return name, self.exact_part(parts)
        return name, parts[-1] if all(map(self.same, constants, constants[1:])) else None

    @staticmethod
    def is_named_by(node: tuple, value: tuple) -> bool:
        if node[0] == "add":  # x + y = 5
            terms = (term[1] if term[0] == "neg" else term for term in node[1])
            return all(map(_is_name, terms)) and not variables(value)
        is_ratio = node[0] == "ratio" or contains(node, {"inv"})  # AB : CD = 1 : 2
        names = variables(node) if is_ratio else {node[1]}
        return _is_name(node) and names.isdisjoint(variables(value))

    def exact_part(self, parts: list[tuple]) -> tuple | None:
        """Of 10/3 = 3.333 ~ 3.3 the one that the others are roundings of."""
        exact = max(parts, key=_places)
        value, *others = (complex(self.value(part)) for part in (exact, *parts))
        bounds = (max(0.999 * 10.0 ** -_places(part), 1e-12 * abs(value)) for part in parts)
        errors = (abs(other - value) for other in others)
        return exact if all(map(operator.lt, errors, bounds)) else None

    def same_named(self, gold: tuple, answer: tuple) -> bool:
        """x = 5 is 5, but 5 does not answer x + y = 5."""
        (gold_name, gold_value), (name, value) = gold, answer
        if gold_value is None or value is None or name is None and gold_name[0] == "add":
            return False
        is_any = None in (gold_name, name) or "text" in (gold_name[0], name[0])
        return (is_any or gold_name == name) and self.same(gold_value, value)

    def same_assignment(self, equations: tuple, values: tuple) -> bool:
        """x = 1, y = 2 is 1, 2 in this order, and (1, 2) in the order of the names."""
        if contains(values, {"rel"}):
            return False
        groups = _groups(equations)
        if values[0] == "list" and len(groups) == 1:
            return self.all_same([item[1][1] for item in equations[1]], values[1])
        points = (("tuple", tuple(item[1][1] for item in group)) for group in groups)
        return self.same(("list", tuple(points)), values)

    def same_collection(self, gold: tuple, answer: tuple) -> bool:
        """The same items, in any order; a tuple is no list."""
        items, answer_items = _items(gold), _items(answer)
        if gold[0] == "set":
            answer_items = list(dict.fromkeys(answer_items))
        units = {_quantity(item)[1] for item in answer_items}
        is_ordered = len(units) > 1 and not any(_quantity(item)[1] for item in items)
        same = self.all_same if is_ordered else self.matches  # 3 boys, 2 girls for 3, 2
        return same(items, answer_items)

    def same_residue(self, gold: tuple, answer: tuple) -> bool:
        """12 (mod 7) is 5 (mod 7); 5 (mod 7) is 5, but 12 (mod 7) is not."""
        nodes = [node for node in (gold, answer) if node[0] == "mod"]
        numbers = [self.value(part) for node in nodes for part in node[1]]
        if answer[0] != "mod" or not all(map(is_integer, numbers)):
            return False
        *gold_numbers, rest, modulus = numbers
        if not gold_numbers:
            return 0 <= rest < modulus and self.same(gold, answer[1][0])
        return gold_numbers[1] == modulus and (gold_numbers[0] - rest) % modulus == 0

    def same_region(self, gold: tuple, answer: tuple) -> bool:
        """The same pieces of the real line."""
        pieces, answer_pieces = self.pieces(gold), self.pieces(answer)
        return bool(pieces) and self.matches(pieces, answer_pieces, self.same_piece)

    def same_piece(self, gold: tuple, answer: tuple) -> bool:
        (name, piece), (answer_name, answer_piece) = gold, answer
        is_same_name = None in (name, answer_name) or name == answer_name
        ends = (piece[1:3], answer_piece[1:3])
        return is_same_name and piece[3:] == answer_piece[3:] and self.all_same(*ends)

    def pieces(self, node: tuple) -> list[tuple[tuple | None, tuple]]:
        """(variable, interval) of each piece of a region; [] for anything else."""
        kind = node[0]
        if kind == "tuple" and len(node[1]) == 2:
            node = ("interval", *node[1], False, False)
        if node[0] == "interval":
            return [(None, node)]
        if kind == "rel":
            return self.inequality(node)
        if kind in ("union", "list"):  # a part that is no region is a point
            parts = (self.pieces(p) or [(None, ("interval", p, p, True, True))] for p in node[1])
            return sum(parts, [])
        return [(None, _EVERYTHING)] if node == _REALS else []

    def inequality(self, node: tuple) -> list[tuple[tuple, tuple]]:
        """x > 2, 2 < x <= 5, 2x > 10; [] for anything else"""
        parts, operators = self.solved(*node[1:])
        if all(o[0] == ">" for o in operators):  # turned to <
            parts, operators = parts[::-1], tuple("<" + o[1:] for o in operators[::-1])
        i = next((i for i, part in enumerate(parts) if part[0] == "var"), None)
        if i is None or any(o[0] != "<" for o in operators):
            return []
        lows, highs = list(parts[:i]) or [_MINUS], list(parts[i + 1 :]) or [_INFINITY]
        if len(lows) > 1 or len(highs) > 1 or variables((*lows, *highs)):
            return []
        closed = [i > 0 and operators[i - 1] == "<=", operators[i:] == ("<=",)]
        return [(parts[i], ("interval", lows[0], highs[0], *closed))]

    @staticmethod
    def solved(parts: tuple, operators: tuple) -> tuple[tuple, tuple]:
        """2x > 10 as x > 5; x + 1 > 6 stays, as that is the question."""
        inner = next((part for part in parts if variables(part)), _INFINITY)
        factors = {"mul": inner[1], "neg": (integer(-1), inner[1])}.get(inner[0], ())
        if [factor[0] for factor in factors] != ["num", "var"] or not factors[0][1]:
            return parts, operators
        slope, x = factors
        parts = tuple(x if part is inner else ("mul", (part, ("inv", slope))) for part in parts)
        return (parts, operators) if slope[1] > 0 else (parts[::-1], operators[::-1])

    def same_quantity(self, gold: tuple, answer: tuple) -> bool:
        """Values with their units: 5 cm is not 5 km; a missing unit is no difference."""
        (gold_value, gold_unit), (value, unit) = _quantity(gold), _quantity(answer)
        if gold_unit and unit:
            is_same = set(gold_unit) - {_UNSURE} == set(unit) - {_UNSURE}
            return is_same and self.same_value(gold_value, value)
        if _UNSURE in (*gold_unit, *unit):
            return False
        if self.same_value(gold_value, value):
            return True
        if ((1, "deg"),) in (gold_unit, unit):  # 90 degrees is pi/2
            return contains(gold if unit else answer, {"const"}) and self.same_value(gold, answer)
        is_percent = gold_value[0] == "pct" and value[0] != "pct" and not unit
        return is_percent and self.same_value(gold_value[1], value)

    def same_value(self, gold: tuple, answer: tuple) -> bool:
        """The same number, or the same function of the same variables."""
        if gold == answer:
            return True
        if contains((gold, answer), {"integral"}):
            return self.symbolic(gold, answer)
        if names := sorted(variables((gold, answer))):
            return self.agree_everywhere(gold, answer, names)
        g, a = self.value_at(gold, {}), self.value_at(answer, {})
        if g is None or a is None:
            return False
        tolerance = self.tolerance * (1 + 1e-9) / (100 if gold[0] == "pct" else 1)
        is_same = _close(g, a) or _is_rounding(gold, a) or _is_rounding(answer, g)
        return is_same or abs(real(g) - real(a)) <= tolerance

    def agree_everywhere(self, gold: tuple, answer: tuple, names: list[str]) -> bool:
        """Equal at many points; without an i, at those where all is real: |x| is not x. Where gold
        holds bars the answer must be real wherever gold is: ln |x| is not ln x."""
        nodes = list(walk((gold, answer)))
        self.budget.spend(len(nodes))
        for real_only in (False,) if ("const", "i") in nodes else (True, False):
            checked = 0
            for point in _points(names, (gold, answer)):
                g = self.value_at(gold, point, real_only)
                a = self.value_at(answer, point, real_only) if g is not None else None
                if g is None or a is None:
                    if g is not None and _calls(gold, {"abs"}):
                        return False
                    continue
                if not _close(g, a):
                    return False
                checked += 1
            if checked >= 3:
                return True
        return False

    def value_at(self, node: tuple, point: dict[str, Fraction], real_only: bool = False):
        """None where there is no value. Raises NoValue when the budget is spent."""
        try:
            return Evaluation(self.budget, point, real_only).value(node)
        except (ArithmeticError, ValueError):
            self.budget.spend(0)
            return None

    def proportional(self, gold: tuple, answer: tuple) -> bool:
        """Equal up to a constant factor: 2x + 4y = 6 is x + 2y - 3 = 0."""
        names = sorted(variables(gold))
        is_solved = gold[1][0][0] == "var" and not variables(gold[1][1])  # 2x = 10 asks for x = 5
        if is_solved or names != sorted(variables(answer)):
            return False
        sides = (gold[1], answer[1])
        gold, answer = (("add", (left, ("neg", right))) for left, right in sides)
        for point in _points(names, (gold, answer)):
            g, a = (self.value_at(node, point) for node in (gold, answer))
            if g and a:
                scaled = ("mul", (gold, ("num", a, 0))), ("mul", (answer, ("num", g, 0)))
                return self.agree_everywhere(*scaled, names)
        return False


# ---- numbers ----


def _close(a, b) -> bool:
    """Equal: exactly, or up to rounding."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = real(a), real(b)
    return abs(a - b) <= ROUNDING * max(abs(a), abs(b))


def _is_rounding(node: tuple, value) -> bool:
    """Is the node a decimal that is the value, rounded to its digits or cut off behind them?

    False for a value that a decimal writes exactly. Digits after the 15th do not count: floating
    point gets them wrong."""
    if node[0] != "num" or node[2] < ROUNDED_DIGITS or not node[1]:
        return False
    if isinstance(value, Fraction):
        denominator = value.denominator
        if 10 ** denominator.bit_length() % denominator == 0:  # a finite decimal
            return False
    elif SMALL.im(value):
        return False
    number = real(node[1])
    unit = SMALL.mpf(10) ** (math.floor(SMALL.log10(abs(number))) + 1 - min(node[2], 15))
    error = SMALL.re(real(value)) * SMALL.sign(number) - abs(number)
    return -unit / 2 <= error < unit


def _places(node: tuple) -> int:
    """Decimal places of a number as written; the most for what is no decimal."""
    if node[0] != "num" or node[1].denominator > 10**15:
        return 15
    return next(k for k in range(60) if 10**k % node[1].denominator == 0)


# ---- points ----

_INTEGER_NAMES = set("nkmNMKjlpqrd")
_STEPWISE = {"floor", "ceil", "factorial", "binom"}
_SIZES = (1, 4, 40, 1000, 10**6)


def _points(names: list[str], nodes: tuple[tuple, tuple]) -> Iterator[dict[str, Fraction]]:
    """Points of both signs and all sizes, the same ones every time.

    Where floors, factorials or (-1)^n occur: many whole numbers, small ones of all residues and
    those beside the numbers of the text; n, k, ... are whole and positive."""
    if len(names) > MAX_VARIABLES:
        raise NoValue("too many variables")
    rng = random.Random(0)
    if not _calls(nodes, _STEPWISE) and not any(map(_is_alternating, walk(nodes))):
        for trial in range(20):
            point = {}
            for name in names:
                size = Fraction(rng.randint(50, 997) * _SIZES[trial % 5], 997)
                point[name] = -size if trial >= 10 and rng.random() < 0.5 else size
            yield point
        return
    numbers = {int(node[1]) for node in walk(nodes) if node[0] == "num" and abs(node[1]) < 10**6}
    special = sorted(n + step for n in numbers for step in (-1, 0, 1) if n + step > 0)
    small = list(range(1, 111))
    for trial in range(len(small) + len(special) + 30):
        pool = [small, special or small, range(1, 10 ** rng.randint(1, 7))][trial % 3]
        point = {name: Fraction(rng.choice(pool)) for name in names}
        if len(names) == 1 and trial < len(small) + len(special):
            point = {names[0]: Fraction((small + special)[trial])}
        for name in set(names) - _INTEGER_NAMES:
            point[name] += rng.choice((0, Fraction(rng.randint(1, 996), 997)))
            point[name] *= rng.choice((1, 1, -1))
        yield point


def _calls(nodes, names: set[str]) -> bool:
    return any(node[0] == "fn" and node[1] in names for node in walk(nodes))


def _is_alternating(node: tuple) -> bool:
    """(-1)^n"""
    is_power = node[0] == "pow" and bool(variables(node[2]))
    return is_power and (node[1][0] == "neg" or node[1][0] == "num" and node[1][1] < 0)
