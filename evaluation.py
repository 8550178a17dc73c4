"""The value of an expression tree of latex.py: exact as long as it can be, then a real or complex number; and matrix arithmetic.

The caps below hold before anything is computed, so that no text can make a number that does not fit into memory, or take long.
"""

import math
import operator
import threading
from fractions import Fraction
from functools import reduce

from mpmath.ctx_mp import MPContext

from latex import MINUS_ONE, Exhausted, TooHard, Undefined

MAX_BITS = 24_000  # of an exact intermediate value
MAX_EXPONENT = 10**6
MAX_FACTORIAL = 3000  # computed exactly; above it by the gamma function
MAX_TERMS = 1000  # of a sum
MAX_STEPS = 20_000  # of all evaluations for one verdict, of about 5 us each

SMALL, LARGE = MPContext(), MPContext()
SMALL.dps, LARGE.dps = 40, 80


def variables(node) -> set[str]:
    """Names of the free variables."""
    if not isinstance(node, tuple):
        return set()
    if node and node[0] == "var":
        return {node[1]}
    if node and node[0] == "series":
        inner = variables(node[5]) - {node[2]}
        return inner | variables(node[3]) | variables(node[4])
    return set().union(*(variables(child) for child in node)) if node else set()


def contains(node, kinds: set[str]) -> bool:
    return (
        isinstance(node, tuple)
        and bool(node)
        and (node[0] in kinds or any(contains(child, kinds) for child in node))
    )


_budget = threading.local()


def start_budget(steps: int = MAX_STEPS) -> None:
    """What this thread may spend from here on; an evaluation that needs more raises Exhausted."""
    _budget.steps = steps


def _spend(steps: int) -> None:
    _budget.steps = getattr(_budget, "steps", MAX_STEPS) - steps
    if _budget.steps < 0:
        raise Exhausted("too many steps")


class Evaluation:
    """The value of a tree at a point: a Fraction as long as it is exact, then a real or complex number of the context's precision.

    Raises Undefined or TooHard.
    """

    def __init__(
        self, point: dict[str, Fraction], context: MPContext = SMALL, real_only: bool = False
    ):
        self.point = point
        self.context = context
        self.real_only = real_only  # sqrt(x) is Undefined at x = -1

    def value(self, node: tuple):
        _spend(1)
        method = getattr(self, "_" + node[0], None)
        if method is None:
            raise TooHard(f"{node[0]} has no value")
        value = method(*node[1:])
        if isinstance(value, Fraction):
            return self.bounded(value)
        if not self.context.isfinite(value):
            raise Undefined("not finite")
        if self.real_only and self.context.im(value):
            raise Undefined("not real")
        return value

    def real(self, value):
        return (
            self.context.mpf(value.numerator) / value.denominator
            if isinstance(value, Fraction)
            else value
        )

    def bounded(self, value: Fraction):
        """The fraction, or a real number when it has grown too large to stay exact."""
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        if bits > 1000:
            _spend((bits // 1000) ** 2)
        return self.real(value) if bits > 2 * MAX_BITS else value

    def _num(self, value, digits):
        return value

    def _var(self, name):
        if name not in self.point:
            raise TooHard(f"{name} has no value")
        return self.point[name]

    def _const(self, name):
        if name == "inf":
            raise Undefined("infinity")
        return {"pi": self.context.pi, "e": self.context.e, "i": self.context.j}[
            name
        ] * self.context.one

    def _add(self, nodes):
        total = Fraction(0)
        for node in nodes:
            total = self.both(total, self.value(node), operator.add)
        return total

    def _mul(self, nodes):
        total = Fraction(1)
        for node in nodes:
            total = self.both(total, self.value(node), operator.mul)
        return total

    def both(self, a, b, operation):
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.bounded(operation(a, b))
        return operation(self.real(a), self.real(b))

    def _inv(self, node):
        value = self.value(node)
        if value == 0:
            raise Undefined("division by zero")
        return 1 / value

    def _neg(self, node):
        return -self.value(node)

    def _pct(self, node):
        return self.value(node) / 100

    def _unit(self, node, powers, factor):
        if powers == (("deg", 1),):
            return self.real(self.value(node)) * self.context.pi / 180
        if powers or factor != 1:
            raise TooHard("a unit within an expression")
        return self.value(node)

    def _pow(self, base, exponent):
        b, e = self.value(base), self.value(exponent)
        if isinstance(e, Fraction) and e.denominator == 1:
            if abs(e) > MAX_EXPONENT:
                raise TooHard("exponent too large")
            if b == 0 and e < 0:
                raise Undefined("division by zero")
            if (
                isinstance(b, Fraction)
                and (b.numerator.bit_length() + b.denominator.bit_length()) * abs(e) <= MAX_BITS
            ):
                return b ** int(e)
            return self.real(b) ** int(e)
        if isinstance(e, Fraction):
            return self.rational_power(b, e)
        return self.general_power(b, e)

    def rational_power(self, b, e: Fraction):
        """Exact where it can be; a negative base has a real odd root."""
        if b == 0:
            if e < 0:
                raise Undefined("division by zero")
            return Fraction(0)
        is_real = isinstance(b, Fraction) or not self.context.im(b)
        if is_real and b < 0 and e.denominator % 2:
            return self.rational_power(-b, e) * (-1) ** (e.numerator % 2)
        if isinstance(b, Fraction) and b > 0 and e.denominator <= 64 and abs(e.numerator) <= 64:
            top, bottom = (
                _exact_root(b.numerator, e.denominator),
                _exact_root(b.denominator, e.denominator),
            )
            if top and bottom and top.bit_length() * abs(e.numerator) <= MAX_BITS:
                return Fraction(top, bottom) ** e.numerator
        return self.general_power(b, self.real(e))

    def general_power(self, b, e):
        b, e = self.real(b), self.real(e)
        if b == 0:
            raise Undefined("0 to a non-integer power")
        log = self.context.log(b)
        self.small(e * log, MAX_EXPONENT)
        return self.context.exp(e * log)

    def small(self, value, limit=10**15):
        if abs(value) > limit:
            raise TooHard("too large")
        return value

    def _fn(self, name, arguments):
        values = [self.value(node) for node in arguments]
        _spend(5 if all(isinstance(value, Fraction) for value in values) else 25)
        method = getattr(self, "fn_" + name, None)
        if method is not None:
            try:
                return method(*values)
            except TypeError:
                raise TooHard(f"{name} of {len(values)} arguments") from None
        if name not in _ANALYTIC or len(values) != 1:
            raise TooHard(f"{name} of {len(values)} arguments")
        x = self.small(self.real(values[0]))
        try:
            return getattr(self.context, name)(x)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise Undefined(name) from None

    def fn_root(self, x, n):
        if not isinstance(n, Fraction) or n == 0:
            raise TooHard("root")
        if isinstance(x, Fraction) and x < 0 and n == 2:
            return self.context.j * self.real(self.rational_power(-x, 1 / n))
        return self.rational_power(x, 1 / n)

    def fn_exp(self, x):
        return self.general_power(self.context.e * 1, x)

    def fn_ln(self, x):
        return self.fn_log(x)

    def fn_lg(self, x):
        return self.fn_log(x, Fraction(10))

    def fn_log(self, x, base=None):
        if x == 0 or base is not None and (base == 0 or base == 1):
            raise Undefined("log")
        log = self.context.log(self.real(x))
        return log if base is None else log / self.context.log(self.real(base))

    def fn_abs(self, x):
        return abs(x)

    def fn_floor(self, x):
        return Fraction(math.floor(self.small(self.as_real(x), 10**30)))

    def fn_ceil(self, x):
        return Fraction(math.ceil(self.small(self.as_real(x), 10**30)))

    def as_real(self, x):
        if isinstance(x, Fraction):
            return x
        if self.context.im(x):
            raise Undefined("not real")
        x = self.context.re(x)
        nearest = self.context.nint(x)
        return nearest if abs(x - nearest) < self.context.mpf(10) ** (10 - self.context.dps) else x

    def fn_factorial(self, n):
        if isinstance(n, Fraction) and n.denominator == 1:
            if n < 0:
                raise Undefined("factorial of a negative number")
            if n <= MAX_FACTORIAL:
                return Fraction(math.factorial(int(n)))
        return self.context.gamma(self.small(self.real(n), 10**6) + 1)

    def fn_binom(self, n, k):
        if (
            all(isinstance(v, Fraction) and v.denominator == 1 for v in (n, k))
            and 0 <= n <= MAX_FACTORIAL
        ):
            return Fraction(math.comb(int(n), int(k))) if k >= 0 else Fraction(0)
        return self.context.binomial(
            self.small(self.real(n), 10**6), self.small(self.real(k), 10**6)
        )

    def integers(self, values) -> list[int]:
        if not all(isinstance(v, Fraction) and v.denominator == 1 for v in values):
            raise TooHard("not integers")
        return [int(v) for v in values]

    def fn_gcd(self, *values):
        return Fraction(math.gcd(*self.integers(values)))

    def fn_lcm(self, *values):
        return Fraction(math.lcm(*self.integers(values)))

    def fn_max(self, *values):
        return max(map(self.as_real, values), key=self.real)

    def fn_min(self, *values):
        return min(map(self.as_real, values), key=self.real)

    def _series(self, name, variable, low, high, body):
        if name == "int" or low is None or contains(high, {"const"}) or contains(low, {"const"}):
            raise TooHard("an integral or infinite series")
        low, high = self.integers([self.value(low), self.value(high)])
        if high - low > MAX_TERMS:
            raise TooHard("too many terms")
        total = Fraction(name == "prod")
        outer, self.point = self.point, dict(self.point)
        for k in range(low, high + 1):
            self.point[variable] = Fraction(k)
            total = self.both(
                total, self.value(body), operator.mul if name == "prod" else operator.add
            )
        self.point = outer
        return total


_ANALYTIC = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
}


def _exact_root(n: int, k: int) -> int:
    """The k-th root of n when it is an integer, else 0."""
    root = math.isqrt(n) if k == 2 else round(n ** (1 / k)) if n.bit_length() < 900 else 0
    return root if root**k == n else 0


# ---- matrix arithmetic ----

_TRANSPOSED = [("var", name) for name in ("T", "t", "\\top", "\\intercal")]
MAX_ENTRY = 300  # nodes in the tree of an entry
MAX_PRODUCTS = 1000  # of entries, in one product of matrices


def fold_matrices(node: tuple) -> tuple:
    """The tree with sums, products, multiples, powers, transposes and determinants of matrices carried out; as it is where it cannot be."""
    if node[0] in ("list", "set", "tuple"):
        return (node[0], tuple(map(fold_matrices, node[1])))
    if node[0] == "rel":
        return ("rel", tuple(map(fold_matrices, node[1])), node[2])
    try:
        return _matrix_value(node)
    except TooHard:
        return node


def _matrix_value(node: tuple) -> tuple:
    kind = node[0]
    if not contains(node, {"matrix"}) or kind == "matrix":
        return node
    if kind == "fn" and node[1] == "det":
        return _determinant(_matrix_value(node[2][0]))
    if kind == "neg":
        return _product(MINUS_ONE, _matrix_value(node[1]))
    if kind == "pow" and node[2] in _TRANSPOSED:
        return ("matrix", tuple(zip(*_entries(_matrix_value(node[1])), strict=True)))
    if kind == "pow" and node[2][0] == "num" and node[2][1] in range(1, 7):
        return reduce(_product, [_matrix_value(node[1])] * int(node[2][1]))
    if kind in ("add", "mul"):
        return reduce(_sum if kind == "add" else _product, map(_matrix_value, node[1]))
    raise TooHard(f"{kind} of a matrix")


def _entries(node: tuple) -> tuple:
    if node[0] != "matrix":
        raise TooHard("not a matrix")
    return node[1]


def _sum(left: tuple, right: tuple) -> tuple:
    a, b = _entries(left), _entries(right)
    if (len(a), len(a[0])) != (len(b), len(b[0])):
        raise TooHard("a sum of matrices of two sizes")
    return (
        "matrix",
        tuple(
            tuple(_exact(("add", pair)) for pair in zip(*rows, strict=True))
            for rows in zip(a, b, strict=True)
        ),
    )


def _product(left: tuple, right: tuple) -> tuple:
    if left[0] != "matrix" != right[0]:
        return _exact(("mul", (left, right)))
    if left[0] != "matrix" or right[0] != "matrix":
        factor, matrix = (left, right) if right[0] == "matrix" else (right, left)
        return (
            "matrix",
            tuple(tuple(_exact(("mul", (factor, entry))) for entry in row) for row in matrix[1]),
        )
    a, columns = left[1], tuple(zip(*right[1], strict=True))
    if len(a[0]) != len(right[1]) or len(a) * len(columns) * len(a[0]) > MAX_PRODUCTS:
        raise TooHard("a product of matrices")
    products = [
        [tuple(("mul", pair) for pair in zip(row, column, strict=True)) for column in columns]
        for row in a
    ]
    return ("matrix", tuple(tuple(_exact(("add", terms)) for terms in row) for row in products))


def _determinant(node: tuple) -> tuple:
    rows = _entries(node)
    if len(rows) != len(rows[0]) or len(rows) > 4:
        raise TooHard("determinant")
    if len(rows) == 1:
        return rows[0][0]
    terms = []
    for j, entry in enumerate(rows[0]):
        minor = _determinant(("matrix", tuple((*row[:j], *row[j + 1 :]) for row in rows[1:])))
        terms.append(_exact(("mul", (entry, ("neg", minor) if j % 2 else minor))))
    return _exact(("add", tuple(terms)))


def _exact(node: tuple) -> tuple:
    """One number in place of an expression that is rational; a cap on all others, as they grow with every product."""
    nodes, size = [node], 0
    while nodes:
        size += 1
        if size > MAX_ENTRY:
            raise TooHard("a matrix with large entries")
        nodes += [child for child in nodes.pop() if isinstance(child, tuple)]
    if variables(node):
        return node
    try:
        value = Evaluation({}).value(node)
    except Undefined:
        return node
    return ("num", value, 0) if isinstance(value, Fraction) else node
