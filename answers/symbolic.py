"""What only sympy can tell: are two answers with integrals equal?

judge asks a worker process, since sympy may take any time and memory; nothing else imports sympy.
"""

from answers.equality import compare
from answers.workers import ask_worker


def judge(gold: str, answer: str, tolerance: float = 0.0, timeout_s: float = 5.0) -> str:
    """The verdict's reason: "correct", "wrong", "unparsable" or "timeout"."""
    reason = compare(gold, answer, tolerance)
    if reason != "undecided":
        return reason
    function = "answers.symbolic:compare_with_sympy"
    return ask_worker(function, [gold, answer], timeout_s, "sympy") or "timeout"


def compare_with_sympy(gold: str, answer: str) -> str:
    """compare with sympy as the last resort; runs in a worker process."""
    try:
        return compare(gold, answer, symbolic=_is_zero_difference)
    except Exception:  # sympy raises anything; equality was not shown
        return "wrong"


def _is_zero_difference(gold: tuple, answer: tuple) -> bool:
    import sympy

    difference = _to_sympy(gold) - _to_sympy(answer)
    return bool(sympy.simplify(difference.doit()) == 0)


def _to_sympy(node: tuple):
    """The tree as a sympy expression, built by constructors, never from text."""
    import sympy

    kind, *rest = node
    if kind == "num":
        return sympy.Rational(rest[0].numerator, rest[0].denominator)
    if kind == "var":
        return sympy.Symbol(rest[0])
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[rest[0]]
    if kind in ("add", "mul"):
        return (sympy.Add if kind == "add" else sympy.Mul)(*map(_to_sympy, rest[0]))
    if kind in _OPERATIONS:
        return _OPERATIONS[kind](*map(_to_sympy, rest))
    if kind == "integral":
        variable, low, high, body = rest
        symbol = sympy.Symbol(variable)
        bounds = symbol if low is None else (symbol, _to_sympy(low), _to_sympy(high))
        return sympy.Integral(_to_sympy(body), bounds)
    if kind == "fn" and rest[0] in _FUNCTIONS:
        return getattr(sympy, _FUNCTIONS[rest[0]])(*map(_to_sympy, rest[1]))
    raise ValueError(f"{kind} has no sympy form")


_OPERATIONS = {
    "inv": lambda x: 1 / x,
    "neg": lambda x: -x,
    "pow": lambda x, y: x**y,
    "pct": lambda x: x / 100,
}
_SAME_NAME = "root sin cos tan cot sec csc asin acos atan sinh cosh tanh log exp floor factorial"
_FUNCTIONS = {name: name for name in _SAME_NAME.split(" ")}
_FUNCTIONS |= {"ln": "log", "abs": "Abs", "ceil": "ceiling", "binom": "binomial"}
