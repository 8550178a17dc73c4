"""Are two mathematical answers equal? Text is parsed by latex.py; nothing here runs sympy or executes text.

Where people disagree about what is equal, this file decides as follows (a false accept is worse than a false reject):
    numbers      exact; a decimal stands for a number without finite decimal only when it is that number rounded to 7 or more digits, or
                 cut off there; 3,14 is also 3.14, but 1,234 is not 1.234; "twenty-one" is 21
    percent      9% is 0.09; the gold 9% also accepts 9, the gold 9 does not accept 9%
    units        a unit missing on one side is no difference; two must measure the same, 5 cm is 50 mm, 5 ft 3 in is 63 in, 1 N is
                 1 kg m/s^2; 90 degrees is 90 and pi/2
    ratios       3:4 is 6:8 and 3/4
    order        (1, 2) is ordered, and neither {1, 2} nor the list 1, 2; lists and sets are not ordered; every item of a list counts
    (1, 2)       is a point, but also the open interval when the other side is one
    x = 5        is 5; it is not y = 5; a chain whose parts contradict each other (x = 41 = 42) is nothing
    x = 1, y = 2 is (1, 2) and the list 1, 2 in this order, but no set
    equations    equal up to a constant factor; inequalities up to a positive one, or as sets of numbers; cases in any order
    matrices     sums, products, multiples and transposes are carried out; a row, a column and a tuple are the same vector
    letters      x is not X; words are compared without case
    functions    equal wherever both are real: 2 ln x is ln x^2, but |x| is not x
    1010_2       is the number ten, and not 1010
"""

import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import product

from evaluation import LARGE, SMALL, Evaluation, contains, fold_matrices, start_budget, variables
from latex import (
    FUNCTIONS,
    GREEK_WORDS,
    MAX_CHARS,
    OTHERWISE,
    Exhausted,
    NotMath,
    TooHard,
    Undefined,
    integer,
    parse,
)
from units import UNITS, compound, number_words_as_digits

MAX_ITEMS = 100
MAX_VARIABLES = 10
ROUNDED_DIGITS = 7  # so many significant digits, correctly rounded, stand for a number that no decimal writes exactly


class Undecided(Exception):
    """Only sympy can tell."""


def symbolic_equality(gold: tuple, answer: tuple) -> bool:
    """Replaced in verify.py's worker process; anywhere else sympy must not run."""
    raise Undecided


def compare(gold: str, answer: str) -> str:
    """The verdict's reason: "correct", "wrong", "unparsable", or "undecided" where only sympy can tell. Never raises."""
    start_budget()
    try:
        gold_node = read(gold)
    except NotMath:
        return "unparsable"
    letter = gold_node[0] == "var" and _CHOICE.match(answer)
    if letter and len(gold_node[1]) == 1 and gold_node[1].isupper():
        return "correct" if letter[1] == gold_node[1] else "wrong"
    try:
        answer_node = read(_CHOICE_LABEL.sub("", answer))
    except NotMath:
        return "unparsable"
    try:
        if _same(gold_node, answer_node):
            return "correct"
        bare = _LETTER_UNIT.match(answer)
        if (
            bare and gold_node[0] != "unit" and not variables(gold_node)
        ):  # 5 m for 5: a unit, as it has a blank before it
            return "correct" if _same(gold_node, read(bare[1])) else "wrong"
        bare = _LETTER_UNIT.match(gold)
        if bare and bare[2] and not contains(answer_node, {"unit", "var"}):  # 5 for 5 m/s
            return "correct" if _same(read(bare[1]), answer_node) else "wrong"
        if _DECIMAL_COMMA.fullmatch(answer) and gold_node[0] in (
            "num",
            "neg",
            "mul",
            "pct",
            "unit",
        ):
            return "correct" if _same(gold_node, read(answer.replace(",", "."))) else "wrong"
        return "wrong"
    except Undecided:
        return "undecided"
    except (
        ArithmeticError,
        ValueError,
        RecursionError,
    ):  # Undefined, TooHard, NotMath, and what mpmath raises
        return "wrong"


# A multiple-choice letter with its text, "(C) 42" or "C. 42"; and the label alone, to be dropped.
_CHOICE = re.compile(
    r"[\s$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?([A-J])[).:][\s}.:~\\$]*(?![-+*/^=_,\s}]|\\[ct])\S"
)
_CHOICE_LABEL = re.compile(
    r"^[\s$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(?[A-E]\)\s*\}|\([A-E]\))[\s~\\]+(?=[\d$\\-])"
)
_LETTER_UNIT = re.compile(
    r"(.*[\d)}])(?:\s|\\,|~|\$)+[msghLNJWVK](\s*/\s*[msgh])?(?:\^\{?-?\d\}?)?[\s.$]*$"
)
_DECIMAL_COMMA = re.compile(
    r"\s*[$]?-?(?:0,\d|\d+,\d\d|\d+,\d{4,})[$%]?\s*"
)  # 0,5 and 3,14; not 1,234 and 1,2
_CHOICE_WORDS = re.compile(
    r"(?:the )?(?:correct |right )?(?:answer|option|choice)(?: is)?[: ]+\(?([A-J])", re.IGNORECASE
)
_ARTICLE = re.compile(r"(?:the answer is |an? |the )(?=[a-z]{3})")
_LEAD_IN_TEXT = re.compile(
    r"\s*(?:\\(?:text|mathrm|mbox)\s*\{)?[A-Za-z][A-Za-z ,']*\b(?:is|are|equals)\b[\s:]*\}?"
)
_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|hbox)\s*\{([^{}]*)\}"
)
_MATHS_WORDS = {"and", "or", "inf", "infinity", "infty", "in", "mod"}
_SHORT_WORDS = {"no", "on", "is", "am", "pm", "up", "go", "us", "he", "we"}
_PHRASES = {
    **dict.fromkeys(
        (
            "no solution",
            "no solutions",
            "no real solution",
            "no real solutions",
            "empty set",
            "the empty set",
        ),
        ("set", ()),
    ),
    **dict.fromkeys(
        ("all real numbers", "all reals", "real numbers", "the real numbers"), ("var", "mathbb R")
    ),
    **dict.fromkeys(("negative infinity", "minus infinity"), ("neg", ("const", "inf"))),
    "none": ("set", ()),
    "dne": ("text", "does not exist"),
}


@lru_cache(maxsize=4096)  # the gold answer comes once for each sample of a group
def read(text: str) -> tuple:
    """The tree of an answer; words become ("text", words), also a sentence that holds words. Raises NotMath."""
    if len(text) > MAX_CHARS:
        raise NotMath(f"longer than {MAX_CHARS} characters")
    if not any(c.isalnum() for c in text) and not any(s in text for s in ("∅", "{", "∞")):
        raise NotMath("no letter and no digit")
    lead_in = _LEAD_IN_TEXT.match(text)
    if lead_in and re.search(r"\d", text[lead_in.end() :]):
        text = text[lead_in.end() :]
    plain = " ".join(_COMMAND.sub(r" \1 ", text).replace("$", " ").replace("\\ ", " ").split())
    words = plain.strip(" .,;:!\"'*`()[]{}")
    choice = _CHOICE_WORDS.fullmatch(words)
    if choice:
        return ("var", choice[1].upper())
    if re.fullmatch(r"[A-Za-z][A-Za-z' -]*", words) and _is_words(words):
        words = words.casefold()
        digits = number_words_as_digits(words)
        words = _ARTICLE.sub("", words, count=1)
        return _PHRASES.get(words) or (("text", words) if digits[0].isalpha() else parse(digits))
    quantity = compound(plain)
    if quantity:
        return ("unit", ("num", quantity[0], 0), *quantity[1])
    time = re.fullmatch(r"(\d{1,2}(?::\d{2})?) ?([ap])\.?m\.?", words.casefold())
    if time:
        return ("text", f"{time[1]} {time[2]}m")
    try:
        node = parse(text)
        return fold_matrices(node) if "matrix}" in text or "array}" in text else node
    except NotMath:
        plain = re.fullmatch(r"[\w .,:;'/-]*[A-Za-z][\w .,:;'/-]*", words)
        if (
            not plain
            and len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", words)) < 2
            or not _is_balanced(text)
        ):
            raise
        return (
            "text",
            words.casefold() if plain else re.sub(r"\s|\\(?:left|right)(?![a-z])", "", words),
        )


def _is_words(text: str) -> bool:
    """Is this run of letters and blanks language, rather than variables and functions?"""
    runs = [
        run
        for run in text.split()
        if len(run) > 1 and run not in FUNCTIONS | GREEK_WORDS | _MATHS_WORDS
    ]
    if len(text.split()) == 1 and re.fullmatch(r"(?:sin|cos|tan|log|ln)[a-z]{0,2}", text):  # sinx
        return False
    return any(len(run) > 2 or run.lower() in _SHORT_WORDS for run in runs)


def _is_balanced(text: str) -> bool:
    if text.count("(") != text.count(")"):
        return False
    depth = 0
    for mark in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth < 0:
            return False
    return depth == 0


# structure


def _same(gold: tuple, answer: tuple) -> bool:
    if gold == answer or {gold, answer} == {_REALS, ("var", "R")}:
        return True
    if gold[0] == "text" or answer[0] == "text":
        return False
    if _is_equation(gold) and _is_equation(answer) and _same_equation(gold, answer):
        return True
    assigned = [_assigned(node) for node in (gold, answer)]
    if any(assigned) and not all(assigned):
        return (
            _same_assignment(assigned[0], answer)
            if assigned[0]
            else _same_assignment(assigned[1], gold)
        )
    (gold_name, gold_values), (name, values) = _named(gold), _named(answer)
    if gold_name is not None and name is not None and not _same_name(gold_name, name):
        if not (
            gold_name[0] == name[0] == "mul" and gold_name[1][0] == name[1][0] and len(name[1]) == 2
        ):  # f(x) = x^2 is f(t) = t^2
            return False
        values = [
            _substituted(value, name[1][1], gold_name[1][1])
            for value in values
            if not _mentions(value, gold_name[1][1])
        ]
    if gold_name is not None or name is not None:
        gold_values, values = gold_values if gold_name else [gold], values if name else [answer]
        return any(_same(g, a) for g in gold_values for a in values)
    if "mod" in (gold[0], answer[0]):
        if gold[0] == answer[0]:
            return _all_same(gold[1:], answer[1:])
        gold, answer = (node[1] if node[0] == "mod" else node for node in (gold, answer))
        return not variables(gold) and _same(gold, answer)  # 7 (mod 11) is 7
    if any(n[0] in ("list", "set") or _has_sign(n) for n in (gold, answer)):
        return _same_collection(gold, answer)
    if "matrix" in (gold[0], answer[0]):
        return _same_matrix(gold, answer)
    if _is_region(gold) or _is_region(answer):
        return _same_region(gold, answer)
    if "cases" in (gold[0], answer[0]):
        return gold[0] == answer[0] and _same_cases(gold[1], answer[1])
    if _BASIS & (variables(gold) | variables(answer)):
        return _same_value(_in_basis(gold), _in_basis(answer))
    if "tuple" in (gold[0], answer[0]):
        return gold[0] == answer[0] and _all_same(gold[1], answer[1])
    if "ratio" in (gold[0], answer[0]):
        return _same_ratio(*(n[1] if n[0] == "ratio" else (n, integer(1)) for n in (gold, answer)))
    return _same_quantity(gold, answer)


_REALS = ("var", "mathbb R")
_HALF_LINES = [("var", "mathbb R^+"), ("var", "mathbb R^-")]
_REGIONS = ("interval", "union", "intersection", "minus", "rel")


def _is_region(node: tuple) -> bool:
    return (
        node[0] in _REGIONS
        or node == _REALS
        or node in _HALF_LINES
        or node[0] == "add"
        and node[1][0] == _REALS
    )  # R - {0}


_FUNCTION_NAMES = set("fghFGHPEVTpqSaNy") | {"\\phi", "\\psi", "\\sigma", "\\tau", "\\mho"}


def _is_equation(node: tuple) -> bool:
    return node[0] == "rel" and node[2] == ("=",)


def _is_name(node: tuple) -> bool:
    """Something that an equation gives a value to: x, m_max, AB, f(x), |PQ|, (x, y), the area."""
    kind = node[0]
    if kind in ("var", "text"):
        return True
    if kind == "unit":
        return _is_name(node[1])
    if kind == "mul":
        factors = node[1]
        if factors[0][0] == "pow":
            return (
                factors[0][1][0] == "var" and factors[0][1][1] in "fgh" and len(factors) == 2
            )  # f^{-1}(x)
        return (
            all(map(_is_name, factors))
            or factors[0][0] == "var"
            and factors[0][1] in _FUNCTION_NAMES
            and len(factors) == 2
        )
    if kind == "fn":
        return node[1] in ("abs", "max", "min", "det") and all(map(_is_name, node[2]))
    return kind == "tuple" and all(map(_is_name, node[1]))


def _named(node: tuple) -> tuple[tuple | None, list[tuple]]:
    """(name, values) of `x = value`, `x \\in set` and chains `x = expr = value ~ decimal`; (None, []) of anything else, and no values for a
    chain that contradicts itself (x = 41 = 42)."""
    if (
        node[0] == "list"
        and _is_equation(node[1][0])
        and not any(n[0] == "rel" for n in node[1][1:])
    ):  # x = 1, 2
        name, values = _named(node[1][0])
        return (name, [("list", (value, *node[1][1:])) for value in values]) if name else (None, [])
    if node[0] == "list" and all(map(_is_equation, node[1])):  # x = 1 or x = 2
        names = {n[1][0] for n in node[1]}
        if len(names) == 1 and _is_name(next(iter(names))):
            return next(iter(names)), [("list", tuple(n[1][-1] for n in node[1]))]
        return None, []
    if (
        node[0] == "mul"
        and len(node[1]) == 2
        and node[1][1][0] == "tuple"
        and _is_label(node[1][0])
    ):  # A(1, 2)
        return node[1][0], [node[1][1]]
    if node[0] != "rel" or not set(node[2]) <= {"=", "~", "in"}:
        return None, []
    parts, operators = list(node[1]), list(node[2])
    if operators == ["="] and parts[1][0] == "var" and not variables(parts[0]):  # 5 = x
        parts.reverse()
    if operators == ["in"] and _is_name(parts[0]):
        return parts[0], [parts[1]]
    if "in" in operators:
        return None, []
    names = []
    inner = variables(parts[-1])
    while len(parts) > 1 and (
        _is_name(parts[0])
        and parts[0][1] not in inner
        or _is_sum_of_variables(parts[0])
        and not inner
    ):
        names.append(parts.pop(0))
        operators.pop(0)
    constants = [part for part in parts if not variables(part)]
    if not names and len(constants) < len(parts):
        return None, []
    for i in range(1, len(parts)):
        if (
            not variables(parts[i - 1])
            and not variables(parts[i])
            and not _near(parts[i - 1], parts[i], operators[i - 1])
        ):
            return names[0] if names else ("text", "="), []
    values = [parts[operators.index("~")], parts[-1]] if "~" in operators else [parts[-1]]
    if len(names) > 1 and parts[-1][0] == "var":  # x = y = z
        return None, []
    return names[0] if names else ("text", "="), values


def _is_label(node: tuple) -> bool:
    return node[0] == "text" or node[0] == "var" and len(node[1]) == 1 and node[1].isupper()


def _is_sum_of_variables(node: tuple) -> bool:
    return node[0] == "add" and all(_is_name(n[1] if n[0] == "neg" else n) for n in node[1])


def _near(left: tuple, right: tuple, operator: str) -> bool:
    if operator == "=":
        return _same(left, right)
    try:
        a, b = (complex(Evaluation({}).value(node)) for node in (left, right))
    except (Undefined, TooHard, OverflowError):
        return False
    return abs(a - b) <= 0.01 * max(abs(a), abs(b))


def _same_name(gold: tuple, answer: tuple) -> bool:
    function = ("mul", (("var", "f"), ("var", "x")))
    y = ("var", "y")
    loose = ("text", "=")
    return (
        gold == answer
        or loose in (gold, answer)
        or "text" in (gold[0], answer[0])
        or {gold, answer} == {y, function}
    )


def _has_sign(node: tuple) -> bool:
    return contains(node, {"pm", "mp"})


def _signed(node, sign: int):
    """The tree with every ± read as sign and every ∓ as its opposite."""
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] in ("pm", "mp"):
        inner = _signed(node[1], sign)
        return inner if (sign > 0) == (node[0] == "pm") else ("neg", inner)
    return tuple(_signed(child, sign) for child in node)


def _items(node: tuple) -> list[tuple]:
    items = list(node[1]) if node[0] in ("list", "set") else [node]
    items = [
        branch
        for item in items
        for branch in ((_signed(item, 1), _signed(item, -1)) if _has_sign(item) else (item,))
    ]
    flat = []
    for item in items:
        flat += _items(item) if item[0] == "list" and len(flat) < MAX_ITEMS else [item]
    return flat


def _same_collection(gold: tuple, answer: tuple) -> bool:
    """Equal as multisets (lists) or sets. A tuple is no set; inequalities joined by "or" are a region."""
    if any(
        n[0] == "list" and all(i[0] == "rel" and not _is_equation(i) for i in n[1])
        for n in (gold, answer)
    ):
        return _same_region(gold, answer)
    if {gold[0], answer[0]} == {"list", "tuple"}:
        return False
    if gold[0] == "list" and answer[0] == "list" and all(map(_is_equation, gold[1] + answer[1])):
        return _matches(list(gold[1]), list(answer[1]))
    if "union" in (gold[0], answer[0]):
        return _same_region(gold, answer)
    gold_items, items = _items(gold), _items(answer)
    if len(gold_items) > MAX_ITEMS or len(items) > MAX_ITEMS:
        raise TooHard("too many items")
    if "set" in (gold[0], answer[0]):
        gold_items, items = _distinct(gold_items), _distinct(items)
    return _matches(gold_items, items)


def _assigned(node: tuple) -> list[tuple] | None:
    """The equations of a list that gives values to several names: x = 1, y = 2."""
    if (
        node[0] != "list"
        or not all(map(_is_equation, node[1]))
        or not all(_is_name(equation[1][0]) for equation in node[1])
    ):
        return None
    return list(node[1]) if len({equation[1][0] for equation in node[1]}) > 1 else None


def _same_assignment(equations: list[tuple], values: tuple) -> bool:
    """x = 1, y = 2 is the list 1, 2 in this order, and the point (1, 2) in the alphabetical order of the names."""
    if _is_equation(values) and values[1][0][0] == values[1][1][0] == "tuple":  # (x, y) = (1, 2)
        pairs = zip(values[1][0][1], values[1][1][1], strict=False)
        return _matches(equations, [("rel", pair, ("=",)) for pair in pairs])
    if values[0] == "tuple" and all(equation[1][0][0] == "var" for equation in equations):
        equations = sorted(equations, key=lambda equation: equation[1][0][1])
    if values[0] not in ("list", "tuple") or contains(values, {"rel"}):
        return False
    return _all_same([equation[1][-1] for equation in equations], values[1])


def _distinct(items: list[tuple]) -> list[tuple]:
    kept: list[tuple] = []
    for item in items:
        if not any(_same(other, item) for other in kept):
            kept.append(item)
    return kept


def _matches(gold_items: list[tuple], items: list[tuple]) -> bool:
    if len(gold_items) != len(items):
        return False
    left = list(items)
    for gold in gold_items:
        for i, item in enumerate(left):
            if _same(gold, item):
                del left[i]
                break
        else:
            return False
    return True


def _all_same(gold_items: Sequence[tuple], items: Sequence[tuple]) -> bool:
    return len(gold_items) == len(items) and all(
        _same(g, a) for g, a in zip(gold_items, items, strict=True)
    )


def _same_matrix(gold: tuple, answer: tuple) -> bool:
    """Entry by entry; [[1, 2], [3, 4]] is a matrix, and a matrix of one column or row is a tuple."""
    if gold[0] != "matrix":
        gold, answer = answer, gold
    gold_rows, rows = gold[1], _rows(answer)
    if _BASIS & variables(answer):
        return _same_value(_in_basis(gold), _in_basis(answer))
    if answer[0] != "matrix" and len(rows) == 1 and len(gold_rows[0]) == 1:
        gold_rows = tuple(zip(*gold_rows, strict=True))
    return len(gold_rows) == len(rows) and all(map(_all_same, gold_rows, rows))


def _rows(node: tuple) -> tuple:
    """Of a matrix, of tuples in a tuple, or one row: a tuple; none of a number. [1, 2] reads as an interval."""
    if node[0] == "matrix":
        return node[1]
    entries = (
        node[1]
        if node[0] == "tuple"
        else node[1:3]
        if node[0] == "interval" and node[3] and node[4]
        else ()
    )
    inner = [_rows(entry) for entry in entries]
    return (
        tuple(rows[0] for rows in inner)
        if inner and all(len(rows) == 1 for rows in inner)
        else (entries,)
        if entries
        else ()
    )


_UNIT_VECTORS = [parse(f"\\vec{{{letter}}}") for letter in "ijk"]
_BASIS = {node[1] for node in _UNIT_VECTORS}


def _in_basis(node: tuple) -> tuple:
    """(3, 4) and 3i + 4j as the sum of 3 times the unit vector i and 4 times j."""
    rows = _rows(node)
    entries = rows[0] if len(rows) == 1 else [row[0] for row in rows]
    if entries and len(entries) <= 3:
        return (
            "add",
            tuple(
                ("mul", (entry, vector))
                for entry, vector in zip(entries, _UNIT_VECTORS, strict=False)
            ),
        )
    for letter, vector in zip(
        (("const", "i"), ("var", "j"), ("var", "k")), _UNIT_VECTORS, strict=True
    ):
        node = _substituted(node, letter, vector)
    return node


def _substituted(node, old: tuple, new: tuple):
    if node == old or not isinstance(node, tuple):
        return new if node == old else node
    return tuple(_substituted(child, old, new) for child in node)


def _same_cases(gold: Sequence[tuple], answer: Sequence[tuple]) -> bool:
    """The same values under the same conditions, in any order."""
    left = _explicit(answer)
    for value, condition in _explicit(gold):
        branch = next((b for b in left if _same(value, b[0]) and _same(condition, b[1])), None)
        if branch is None:
            return False
        left.remove(branch)
    return not left


def _explicit(branches: Sequence[tuple]) -> list[tuple]:
    """With what the other conditions leave of the real line for "otherwise"."""
    others = [condition for _, condition in branches if condition != OTHERWISE]
    pieces = _region(("union", tuple(others)))[1] if others else None
    if pieces is None:
        return list(branches)
    ends = [
        (("neg", _INFINITY), True),
        *(end for piece in pieces for end in (piece[:2], piece[2:])),
        (_INFINITY, True),
    ]
    gaps = [
        ("interval", low[0], high[0], not low[1], not high[1])
        for low, high in zip(ends[::2], ends[1::2], strict=True)
    ]
    rest = tuple(gap for gap in gaps if _order(gap[1]) < _order(gap[2]) or gap[3] and gap[4])
    return [
        (value, ("union", rest) if condition == OTHERWISE else condition)
        for value, condition in branches
    ]


def _same_ratio(gold: Sequence[tuple], answer: Sequence[tuple]) -> bool:
    """3:2 is 6:4, but 12:00 is not 1:00."""
    if len(gold) != len(answer):
        return False
    if any(n == integer(0) for n in (*gold, *answer)):
        return _all_same(gold, answer)
    return all(
        _same_value(("mul", (gold[0], ("inv", g))), ("mul", (answer[0], ("inv", a))))
        for g, a in zip(gold[1:], answer[1:], strict=True)
    )


def _same_equation(gold: tuple, answer: tuple) -> bool:
    """Equal up to a constant factor: 2x + 4y = 6 is x + 2y - 3 = 0."""
    sides = [n for node in (gold, answer) for n in node[1]]
    if any(n[0] in (*_REGIONS, "text", "list", "set", "tuple", "matrix") for n in sides):
        return all(_same(g, a) for g, a in zip(gold[1], answer[1], strict=True))
    if not variables(gold) or variables(gold) != variables(answer) or any(map(_has_sign, sides)):
        return all(_same(g, a) for g, a in zip(gold[1], answer[1], strict=True))
    return _proportional(_difference(gold), _difference(answer), positive=False)


def _difference(relation: tuple) -> tuple:
    left, right = relation[1]
    return ("add", (left, ("neg", right)))


# intervals, inequalities and unions of them


def _same_region(gold: tuple, answer: tuple) -> bool:
    """The same set of real numbers (and the same variable, where both name one); or inequalities equal up to a positive factor."""
    (gold_name, gold_region), (name, region) = _region(gold), _region(answer)
    if gold_region is not None and region is not None:
        if gold_name is not None and name is not None and gold_name != name:
            return False
        return len(gold_region) == len(region) and all(map(_same_piece, gold_region, region))
    if gold[0] == answer[0] == "rel" and len(gold[2]) == len(answer[2]) == 1:
        (g, g_strict), (a, strict) = _positive_side(gold), _positive_side(answer)
        return (
            g is not None
            and a is not None
            and g_strict == strict
            and _proportional(g, a, positive=True)
        )
    if (
        gold[0] in ("interval", "tuple")
        and answer[0] in ("interval", "tuple")
        and len(gold[1]) == 2
    ):
        g, a = (
            n if n[0] == "interval" else ("interval", *n[1], False, False) if len(n[1]) == 2 else n
            for n in (gold, answer)
        )
        return len(g) == len(a) == 5 and g[3:] == a[3:] and _same(g[1], a[1]) and _same(g[2], a[2])
    if gold[0] == answer[0] and gold[0] in ("interval", "union", "intersection", "minus"):
        if gold[0] == "interval":
            return (
                gold[3:] == answer[3:] and _same(gold[1], answer[1]) and _same(gold[2], answer[2])
            )
        return (
            _all_same(gold[1:], answer[1:])
            if gold[0] == "minus"
            else _matches(list(gold[1]), list(answer[1]))
        )
    if gold[0] == answer[0] == "rel" and gold[2] == answer[2]:
        return _all_same(gold[1], answer[1])
    return False


def _positive_side(relation: tuple) -> tuple[tuple | None, str]:
    """(f, strictness) such that the inequality says f > 0, f >= 0 or f != 0."""
    operator = relation[2][0]
    if operator not in ("<", "<=", ">", ">=", "!="):
        return None, operator
    f = _difference(relation)
    return (("neg", f) if operator[0] == "<" else f), operator[1:] if operator != "!=" else operator


_Piece = tuple[tuple, bool, tuple, bool]  # low, closed, high, closed
_INFINITY = ("const", "inf")
_EVERYTHING: list[_Piece] = [(("neg", _INFINITY), False, _INFINITY, False)]


def _region(node: tuple) -> tuple[tuple | None, list[_Piece] | None]:
    """(variable, pieces in order) of a set of reals with constant ends; pieces is None for anything else."""
    try:
        name, pieces = _pieces(node)
        return name, None if pieces is None else _joined(pieces)
    except (Undefined, TooHard):
        return None, None


def _pieces(node: tuple) -> tuple[tuple | None, list[_Piece] | None]:
    kind = node[0]
    if kind == "interval":
        return None, [(node[1], node[3], node[2], node[4])]
    if kind == "tuple" and len(node[1]) == 2:
        return None, [(node[1][0], False, node[1][1], False)]
    if kind == "set":
        return None, [(item, True, item, True) for item in node[1]]
    if node == _REALS:
        return None, _EVERYTHING
    if node in _HALF_LINES:
        return None, [
            (integer(0), False, _INFINITY, False)
            if node[1][-1] == "+"
            else (("neg", _INFINITY), False, integer(0), False)
        ]
    if kind == "rel":
        return _inequality(node)
    if kind in ("union", "list", "intersection"):
        names, pieces = set(), []
        for part in node[1]:
            name, more = _pieces(part)
            if more is None:
                return None, None
            names.add(name)
            pieces += more
        covers_all = [piece[::2] for piece in _joined(pieces)] == [(("neg", _INFINITY), _INFINITY)]
        if kind == "intersection" or kind == "list" and covers_all:  # x > 2 and x < 5
            pieces = reduce(_intersection, (_pieces(part)[1] for part in node[1]))
        return next(iter(names - {None}), None), pieces if len(names - {None}) < 2 else None
    if kind == "add" and len(node[1]) == 2 and node[1][1][0] == "neg":  # R - {0}
        kind, node = "minus", ("minus", node[1][0], node[1][1][1])
    if kind == "minus" and node[2][0] == "set":
        name, pieces = _pieces(node[1])
        for item in node[2][1] if pieces is not None else ():
            pieces = _without(_joined(pieces), item)
        return name, pieces
    return None, None


def _inequality(node: tuple) -> tuple[tuple | None, list[_Piece] | None]:
    """x > 2, 2 < x <= 5, x != 3, 2x + 1 > 7, |x - 1| < 2 with constants at the ends."""
    parts, operators = node[1], node[2]
    if operators == ("in",) and parts[0][0] == "var":
        return parts[0], _pieces(parts[1])[1]
    if len(parts) == 2 and variables(parts[1]) and not variables(parts[0]):
        parts, operators = parts[::-1], (operators[0].translate(_TURNED),)
    if len(parts) == 2 and parts[0][0] == "fn" and parts[0][1] == "abs" and not variables(parts[1]):
        return _absolute(parts[0][2][0], operators[0], parts[1])
    middle = len(parts) - 2  # where the variable stands
    line = _line(parts[middle]) if len(parts) <= 3 else None
    if line is None or any(variables(part) for i, part in enumerate(parts) if i != middle):
        return None, None
    name, slope, intercept = line
    if (slope, intercept) != (1, 0):
        move = ("num", -intercept / slope, 0)
        parts = tuple(("add", (("mul", (part, ("num", 1 / slope, 0))), move)) for part in parts)
        operators = tuple(o.translate(_TURNED) if slope < 0 else o for o in operators)
    if len(parts) == 2:
        operator, end = operators[0], parts[1]
        if operator in ("=", "!="):
            return name, [(end, True, end, True)] if operator == "=" else _without(_EVERYTHING, end)
        rays = {
            ">": [(end, operator == ">=", _INFINITY, False)],
            "<": [(("neg", _INFINITY), False, end, operator == "<=")],
        }
        return (name, rays[operator[0]]) if operator[0] in rays else (None, None)
    if operators[0][0] == operators[1][0] == ">":
        parts, operators = parts[::-1], tuple("<" + o[1:] for o in operators[::-1])
    if operators[0][0] == operators[1][0] == "<":
        return name, [(parts[0], operators[0] == "<=", parts[2], operators[1] == "<=")]
    return None, None


_TURNED = str.maketrans("<>", "><")


def _absolute(inside: tuple, operator: str, end: tuple) -> tuple[tuple | None, list[_Piece] | None]:
    if operator[0] not in "<>" or _order(end) <= 0:
        return None, None
    if operator[0] == "<":
        return _inequality(("rel", (("neg", end), inside, end), (operator, operator)))
    sides = ((operator, end), (operator.translate(_TURNED), ("neg", end)))
    return _pieces(("union", tuple(("rel", (inside, e), (o,)) for o, e in sides)))


def _line(node: tuple) -> tuple[tuple, Fraction, Fraction] | None:
    """(variable, slope, intercept) of a linear expression with rational coefficients."""
    if node[0] == "var":
        return node, Fraction(1), Fraction(0)
    names = variables(node)
    if len(names) != 1:
        return None
    name = names.pop()
    at = [
        Evaluation({name: x}).value(node)
        for x in (Fraction(0), Fraction(1), Fraction(-7, 3), Fraction(1009, 5))
    ]
    if not all(isinstance(value, Fraction) for value in at) or at[0] == at[1]:
        return None
    slope = at[1] - at[0]
    if at[2] != at[0] - slope * 7 / 3 or at[3] != at[0] + slope * 1009 / 5:
        return None
    return ("var", name), slope, at[0]


def _without(pieces: list[_Piece], point: tuple) -> list[_Piece]:
    out = []
    for low, low_closed, high, high_closed in pieces:
        if _order(low) < _order(point) < _order(high):
            out += [(low, low_closed, point, False), (point, False, high, high_closed)]
        else:
            out.append(
                (
                    low,
                    low_closed and _order(low) != _order(point),
                    high,
                    high_closed and _order(high) != _order(point),
                )
            )
    return out


def _intersection(left: list[_Piece], right: list[_Piece]) -> list[_Piece]:
    pieces = []
    for (a, a_closed, b, b_closed), (c, c_closed, d, d_closed) in product(left, right):
        low = (
            (a, a_closed and (_order(a) > _order(c) or c_closed))
            if _order(a) >= _order(c)
            else (c, c_closed)
        )
        high = (
            (b, b_closed and (_order(b) < _order(d) or d_closed))
            if _order(b) <= _order(d)
            else (d, d_closed)
        )
        if (
            _order(low[0]) < _order(high[0])
            or _order(low[0]) == _order(high[0])
            and low[1]
            and high[1]
        ):
            pieces.append((*low, *high))
    return pieces


def _joined(pieces: list[_Piece]) -> list[_Piece]:
    """In order, pieces that touch joined to one."""
    out: list[_Piece] = []
    for piece in sorted(pieces, key=lambda p: (_order(p[0]), not p[1])):
        if out and (
            _order(piece[0]) < _order(out[-1][2])
            or _order(piece[0]) == _order(out[-1][2])
            and (piece[1] or out[-1][3])
        ):
            low, low_closed, high, high_closed = out[-1]
            if _order(piece[2]) > _order(high) or _order(piece[2]) == _order(high) and piece[3]:
                high, high_closed = piece[2], piece[3]
            out[-1] = (low, low_closed, high, high_closed)
        else:
            out.append(piece)
    return out


def _order(end: tuple) -> float:
    """The place of an end on the real line, to compare with."""
    if end in (_INFINITY, ("neg", _INFINITY)):
        return float("inf") if end == _INFINITY else float("-inf")
    value = Evaluation({}).value(end)
    if not isinstance(value, Fraction) and SMALL.im(value):
        raise Undefined("not real")
    try:
        return float(value if isinstance(value, Fraction) else SMALL.re(value))
    except OverflowError:
        raise TooHard("too large") from None


def _same_piece(gold: _Piece, answer: _Piece) -> bool:
    return (
        gold[1] == answer[1]
        and gold[3] == answer[3]
        and _same_end(gold[0], answer[0])
        and _same_end(gold[2], answer[2])
    )


def _same_end(gold: tuple, answer: tuple) -> bool:
    ends = (_INFINITY, ("neg", _INFINITY))
    return gold == answer if gold in ends or answer in ends else _same(gold, answer)


# quantities


def _same_quantity(gold: tuple, answer: tuple) -> bool:
    """Values with their units: 5 cm is 50 mm but not 5 km; a missing unit is no difference.

    9% is 0.09 and not 9; but where the gold says 9%, the question has asked for the percentage, and 9 is right."""
    (gold_value, gold_unit, gold_factor), (value, unit, factor) = _quantity(gold), _quantity(answer)
    if (gold_unit or gold[0] == "mul") and (unit or answer[0] == "mul") and gold != answer:
        with_units = [
            _letters_as_unit(n) if n[0] == "mul" else _quantity(n) for n in (gold, answer)
        ]
        if all(with_units):
            (gold_value, gold_unit, gold_factor), (value, unit, factor) = with_units
    if gold_unit and unit:
        scaled = [
            ("mul", (v, ("num", f, 0))) if gold_factor != factor else v
            for v, f in ((gold_value, gold_factor), (value, factor))
        ]
        return gold_unit == unit and _same_value(*scaled)
    if _same_value(gold_value, value):
        return True
    degrees = (("deg", 1),)
    if degrees in (gold_unit, unit):
        return _same_value(gold, answer) and contains(gold if unit else answer, {"const"})
    percent = _percent(gold_value)
    return (
        percent is not None and not unit and _percent(value) is None and _same_value(percent, value)
    )


def _quantity(node: tuple) -> tuple[tuple, tuple, Fraction]:
    if node[0] == "unit":
        return node[1], node[2], node[3]
    if node[0] == "neg" and node[1][0] == "unit":
        return ("neg", node[1][1]), node[1][2], node[1][3]
    return node, (), Fraction(1)


def _percent(node: tuple) -> tuple | None:
    if node[0] == "neg" and node[1][0] == "pct":
        return ("neg", node[1][1])
    return node[1] if node[0] == "pct" else None


def within(gold: str, answer: str, tolerance: float) -> bool:
    """Is the answer a number at most tolerance away from gold, in gold's unit (of the gold 4.2%, in percent)?"""
    start_budget()
    try:
        nodes = [read(text) for text in (gold, answer)]
        (gold_value, gold_unit, gold_factor), (value, unit, factor) = (
            _quantity((_named(node)[1] or [node])[-1]) for node in nodes
        )
        if gold_unit and unit and gold_unit != unit:
            return False
        if _percent(gold_value) is not None:
            gold_value, value = _percent(gold_value), _percent(value) or value
        far = complex(Evaluation({}).value(value)) * float(
            factor / gold_factor if unit and gold_unit else 1
        )
        return abs(far - complex(Evaluation({}).value(gold_value))) <= tolerance * (1 + 1e-9)
    except (
        ArithmeticError,
        ValueError,
        RecursionError,
    ):  # Undefined, TooHard, NotMath, and what mpmath raises
        return False


def _letters_as_unit(node: tuple) -> tuple[tuple, tuple, Fraction] | None:
    """5m/s, read as variables, as 5 of a unit."""
    values, powers, factor = [], {}, Fraction(1)
    for part, power in _factors(node):
        if part[0] == "var" and part[1] in UNITS and abs(power) < 10:
            bases, one = UNITS[part[1]]
            for base, exponent in bases:
                powers[base] = powers.get(base, 0) + power * exponent
            factor *= one**power
        elif variables(part):
            return None
        else:
            values.append(part if power == 1 else ("pow", part, integer(power)))
    return (
        (("mul", tuple(values)), tuple(sorted((b, p) for b, p in powers.items() if p)), factor)
        if values and powers
        else None
    )


def _factors(node: tuple, sign: int = 1) -> list[tuple[tuple, int]]:
    """The factors of a product, with their exponents where those are integers."""
    if node[0] == "mul":
        return [factor for child in node[1] for factor in _factors(child, sign)]
    if node[0] == "inv":
        return _factors(node[1], -sign)
    exponent = node[2] if node[0] == "pow" else None
    minus = -1 if exponent and exponent[0] == "neg" else 1
    exponent = exponent[1] if minus < 0 else exponent
    if exponent and exponent[0] == "num" and exponent[1].denominator == 1:
        return [(node[1], int(exponent[1]) * minus * sign)]
    return [(node, sign)]


# numbers


def _decimal(node: tuple) -> tuple[Fraction, int] | None:
    """(value, significant digits) of a number that is written as a decimal."""
    if node[0] == "neg":
        inner = _decimal(node[1])
        return inner and (-inner[0], inner[1])
    return (node[1], node[2]) if node[0] == "num" and node[2] else None


def _is_rounding(decimal: tuple[Fraction, int] | None, value) -> bool:
    """Is the decimal the value, rounded to its own digits or cut off behind them, of which there are enough? Never of a value that a
    decimal writes exactly. Of a 16th digit nothing is asked: floating point has got it wrong."""
    if decimal is None or decimal[1] < ROUNDED_DIGITS or not decimal[0]:
        return False
    if (
        isinstance(value, Fraction)
        and _has_finite_decimal(value)
        or not isinstance(value, Fraction)
        and SMALL.im(value)
    ):
        return False
    number, digits = decimal
    size = abs(number)
    magnitude = len(str(size.numerator // size.denominator)) if size >= 1 else -_leading_zeros(size)
    exact = (
        value
        if isinstance(value, Fraction)
        else Fraction(int(SMALL.nint(SMALL.re(value) * 10**60)), 10**60)
    )
    unit = Fraction(10) ** (magnitude - min(digits, 15))
    return abs(exact - number) <= unit / 2 or exact * number > 0 and 0 <= abs(exact) - size < unit


def _leading_zeros(number: Fraction) -> int:
    """After the decimal point: 2 of 0.00123."""
    zeros = 0
    while number * 10 ** (zeros + 1) < 1:
        zeros += 1
    return zeros


def _has_finite_decimal(value: Fraction) -> bool:
    d = value.denominator
    while d % 2 == 0:
        d //= 2
    while d % 5 == 0:
        d //= 5
    return d == 1


def _same_value(gold: tuple, answer: tuple) -> bool:
    """The same number, or the same function of the same variables."""
    if gold == answer:
        return True
    gold, answer = _without_common_terms(
        gold, answer
    )  # e^100 + 1 is not e^100, to however few digits they are computed
    try:
        names = sorted(variables(gold) | variables(answer))
        if not names:
            return _same_number(
                gold, answer, {}, Evaluation({}).value(gold), Evaluation({}).value(answer)
            )
        return _agree_everywhere(gold, answer, names)
    except Undefined:
        return False
    except TooHard as error:
        if contains(gold, {"series"}) or contains(answer, {"series"}):
            return symbolic_equality(gold, answer)
        if isinstance(error, Exhausted):
            raise
        return False


def _terms(node: tuple, sign: int = 1) -> list[tuple[tuple, int]]:
    if node[0] == "add":
        return [term for child in node[1] for term in _terms(child, sign)]
    return _terms(node[1], -sign) if node[0] == "neg" else [(node, sign)]


def _without_common_terms(gold: tuple, answer: tuple) -> tuple[tuple, tuple]:
    if "add" not in (gold[0], answer[0]):
        return gold, answer
    gold_terms, terms = _terms(gold), _terms(answer)
    common = (
        [term for term in gold_terms if term in terms]
        if len(gold_terms) + len(terms) <= MAX_ITEMS
        else []
    )
    if not common:
        return gold, answer
    for term in common:
        if term in terms:
            gold_terms.remove(term)
            terms.remove(term)
    return _sum_of(gold_terms), _sum_of(terms)


def _sum_of(terms: list[tuple[tuple, int]]) -> tuple:
    return ("add", tuple(node if sign > 0 else ("neg", node) for node, sign in terms))


def _same_number(gold: tuple, answer: tuple, point: dict[str, Fraction], g, a) -> bool:
    """Do the trees agree at the point, where their values are g and a?"""
    if isinstance(g, Fraction) and isinstance(a, Fraction):
        if g == a or point:
            return g == a
    elif _close(g, a):
        return True
    elif all(
        map(_is_tiny, (g, a))
    ):  # nearly zero, or zero up to rounding: a second look with more digits
        return _close_at_high_precision(gold, answer, point)
    if point:
        return False
    if _decimal(gold) is None:
        return _is_rounding(_decimal(answer), g)
    return _decimal(answer) is None and _is_rounding(_decimal(gold), a)


def _is_tiny(value) -> bool:
    return abs(value) < (
        Fraction(1, 10**15) if isinstance(value, Fraction) else SMALL.mpf(10) ** -15
    )


def _close(a, b, context=SMALL) -> bool:
    """Equal up to rounding, relative to the larger."""
    a, b = (
        context.mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v for v in (a, b)
    )
    return abs(a - b) <= context.mpf(10) ** -25 * max(abs(a), abs(b))


def _close_at_high_precision(gold: tuple, answer: tuple, point: dict[str, Fraction]) -> bool:
    return _close(*(_without_noise(node, point) for node in (gold, answer)), LARGE)


def _without_noise(node: tuple, point: dict[str, Fraction]):
    """The value with many digits: sqrt(2) - sqrt(2) is zero and e^-200 is not, as another precision gives it the same digits."""
    value, check = (Evaluation(point, context).value(node) for context in (LARGE, SMALL))
    if isinstance(value, Fraction) or abs(value - check) <= LARGE.mpf(10) ** -10 * abs(value):
        return value
    return LARGE.zero


_INTEGER_NAMES = set("nkmNMKjlpqrd")
_STEPWISE = {"floor", "ceil", "factorial", "binom", "gcd", "lcm"}


def _points(names: list[str], nodes: tuple[tuple, tuple]) -> Iterator[dict[str, Fraction]]:
    """Random points of both signs and sizes, the same ones every time.

    Whole numbers for n, k, ... where floors, factorials, (-1)^n or sums occur."""
    if len(names) > MAX_VARIABLES:
        raise TooHard("too many variables")
    whole = any(_needs_integers(node) for node in nodes)
    for trial in range(6):
        rng = random.Random(trial)
        point = {}
        for name in names:
            if whole and name in _INTEGER_NAMES:
                point[name] = Fraction(rng.randint(2, 12) + trial)
            else:
                size = Fraction(
                    rng.randint(50, 950) if trial in (2, 5) else rng.randint(1000, 4000), 997
                )
                point[name] = -size if trial % 2 and rng.random() < 0.6 else size
        yield point


def _needs_integers(node) -> bool:
    if not isinstance(node, tuple) or not node:
        return False
    if node[0] == "series" or node[0] == "fn" and node[1] in _STEPWISE:
        return True
    if node[0] == "pow" and variables(node[2]) and (contains(node[1], {"neg"})):
        return True
    return any(map(_needs_integers, node))


def _agree_everywhere(gold: tuple, answer: tuple, names: list[str]) -> bool:
    """Equal at random points. Without an i in sight, only points where all is real count: 2 ln x is ln x^2, but |x| is not x."""
    is_complex = any(_mentions(node, ("const", "i")) for node in (gold, answer))
    for real_only in (False,) if is_complex else (True, False):
        checked = 0
        for point in _points(names, (gold, answer)):
            try:
                g, a = (
                    Evaluation(point, real_only=real_only).value(node) for node in (gold, answer)
                )
            except Undefined:
                continue
            if not _same_number(gold, answer, point, g, a):
                return False
            checked += 1
        if checked >= 2:
            return True
    return False


def _mentions(node, wanted: tuple) -> bool:
    return (
        node == wanted
        or isinstance(node, tuple)
        and any(_mentions(child, wanted) for child in node)
    )


def _proportional(gold: tuple, answer: tuple, positive: bool) -> bool:
    """Is gold / answer the same non-zero (positive) constant at random points?"""
    ratio, checked = None, 0
    for point in _points(sorted(variables(gold) | variables(answer)), (gold, answer)):
        try:
            g, a = (Evaluation(point).value(node) for node in (gold, answer))
        except Undefined:
            continue
        except TooHard:
            return False
        if g == 0 or a == 0:
            if g != a:
                return False
            continue
        here = (
            g / a
            if isinstance(g, Fraction) and isinstance(a, Fraction)
            else Evaluation({}).real(g) / Evaluation({}).real(a)
        )
        if ratio is not None and not (
            here == ratio
            if isinstance(here, Fraction) and isinstance(ratio, Fraction)
            else _close(here, ratio)
        ):
            return False
        if (
            positive
            and not (isinstance(here, Fraction) or not SMALL.im(here))
            or positive
            and here < 0
        ):
            return False
        ratio, checked = here, checked + 1
    return checked >= 3
