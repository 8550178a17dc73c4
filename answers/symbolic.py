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
    import sympy

    def same(gold: tuple, answer: tuple) -> bool:
        return bool(sympy.simplify((_to_sympy(gold) - _to_sympy(answer)).doit()) == 0)

    try:
        return compare(gold, answer, symbolic=same)
    except Exception:  # sympy raises anything; equality was not shown
        return "wrong"


def _to_sympy(node: tuple):
    """The tree as a sympy expression, built by constructors, never from text."""
    import sympy

    kind, *rest = node
    if kind == "num":
        return sympy.Rational(rest[0])
    if kind == "var":
        return sympy.Symbol(rest[0])
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[rest[0]]
    if kind in ("add", "mul"):
        return (sympy.Add if kind == "add" else sympy.Mul)(*map(_to_sympy, rest[0]))
    if kind == "integral":
        variable, *parts = rest
        low, high, body = map(_to_sympy, parts)
        return sympy.Integral(body, (sympy.Symbol(variable), low, high))
    if kind == "fn":  # one of latex.FUNCTIONS
        name = "Abs" if rest[0] == "abs" else rest[0]
        return getattr(sympy, name)(*map(_to_sympy, rest[1]))
    operations = {"inv": lambda x: 1 / x, "neg": lambda x: -x, "pow": sympy.Pow}
    return operations[kind](*map(_to_sympy, rest))
