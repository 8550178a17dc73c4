"""The value of an expression tree of latex.py: exact where possible, else a real or complex number.

The caps are checked before anything is computed, so that no text exhausts memory or time.
"""

import math
import operator
from collections.abc import Iterator
from fractions import Fraction

from mpmath.ctx_mp import MPContext

MAX_BITS = 24_000  # of an exact intermediate value
MAX_REAL_BITS = 400  # of a fraction beside irrational numbers
MAX_EXPONENT = 10**6
MAX_FACTORIAL = 3000  # computed exactly; above it by the gamma function
MAX_STEPS = 20_000  # of all evaluations for one verdict

SMALL = MPContext()
SMALL.dps = 150
ROUNDING = SMALL.mpf(10) ** -130  # relative; what differs by less counts as equal


class NoValue(ArithmeticError):
    """No value at this point (log 0), of this kind (infinity), or within the caps."""


class Budget:
    """The steps that all evaluations for one verdict may take together."""

    def __init__(self, steps: int = MAX_STEPS):
        self.steps = steps

    def spend(self, steps: int) -> None:
        """Raises NoValue when no steps are left."""
        self.steps -= steps
        if self.steps < 0:
            raise NoValue("too many steps")


def real(value):
    """A Fraction as a number of SMALL; other values as they are. Raises NoValue for a Fraction that
    this precision does not tell from its neighbours."""
    if not isinstance(value, Fraction):
        return value
    if _bits(value) > MAX_REAL_BITS:
        raise NoValue("too many digits")
    return SMALL.mpf(value.numerator) / value.denominator


def is_integer(value) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1


def walk(node: tuple) -> Iterator[tuple]:
    """Every node of a tree, or of a tuple of trees."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, tuple) and node:
            stack += node
            if isinstance(node[0], str):
                yield node


def variables(node) -> set[str]:
    """Names of the free variables."""
    bound = {found[1] for found in walk(node) if found[0] == "integral"}
    return {found[1] for found in walk(node) if found[0] == "var"} - bound


def contains(node, kinds: set[str]) -> bool:
    return any(found[0] in kinds for found in walk(node))


class Evaluation:
    """The value of a tree at a point: a Fraction while exact, then a number of SMALL's precision.

    Raises ArithmeticError (NoValue, division by zero) or, as mpmath does at a pole, ValueError.
    """

    def __init__(self, budget: Budget, point: dict[str, Fraction], real_only: bool = False):
        self.budget = budget
        self.point = point
        self.real_only = real_only  # sqrt(x) has no value at x = -1

    def value(self, node: tuple):
        self.budget.spend(1)
        method = getattr(self, "_" + node[0], None)
        if method is None:
            raise NoValue(f"{node[0]} has no value")
        value = method(*node[1:])
        if isinstance(value, Fraction):
            return self.bounded(value)
        if not SMALL.isfinite(value):
            raise NoValue("not finite")
        if self.real_only and SMALL.im(value):
            raise NoValue("not real")
        return value

    def bounded(self, value: Fraction):
        """The fraction, or a real number when it has grown too large to stay exact."""
        bits = _bits(value)
        if bits > 1000:
            self.budget.spend((bits // 1000) ** 2)
        return real(value) if bits > 2 * MAX_BITS else value

    def _num(self, value, digits):
        return value

    def _var(self, name):
        if name not in self.point:
            raise NoValue(f"{name} has no value")
        return self.point[name]

    def _const(self, name):
        if name not in _CONSTANTS:
            raise NoValue(f"{name} has no value")
        return _CONSTANTS[name]

    def _add(self, nodes):
        total = Fraction(0)
        for node in nodes:
            value = self.value(node)
            before, total = total, self.both(total, value, operator.add)
            if not isinstance(total, Fraction):
                low, high = sorted((abs(real(before)), abs(real(value))))
                if 0 < low < high * ROUNDING:
                    raise NoValue("a term is lost beside the others")
        return total

    def _mul(self, nodes):
        total = Fraction(1)
        for node in nodes:
            total = self.both(total, self.value(node), operator.mul)
        return total

    def both(self, a, b, operation):
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.bounded(operation(a, b))
        return operation(real(a), real(b))

    def _inv(self, node):
        return 1 / self.value(node)

    def _neg(self, node):
        return -self.value(node)

    def _pct(self, node):
        return self.value(node) / 100

    def _unit(self, node, powers):
        if powers == ((1, "deg"),):
            return real(self.value(node)) * SMALL.pi / 180
        if powers:
            raise NoValue("a unit within an expression")
        return self.value(node)

    def _pow(self, base, exponent):
        b, e = self.value(base), self.value(exponent)
        if is_integer(e):
            if abs(e) > MAX_EXPONENT:
                raise NoValue("exponent too large")
            is_small = isinstance(b, Fraction) and _bits(b) * abs(e) <= MAX_BITS
            return (b if is_small else real(b)) ** int(e)
        if isinstance(e, Fraction):
            return self.rational_power(b, e)
        return self.general_power(b, e)

    def rational_power(self, b, e: Fraction):
        """Exact where it can be; a negative base has a real odd root."""
        if b == 0 and e > 0:
            return b
        is_real = isinstance(b, Fraction) or not SMALL.im(b)
        if is_real and b < 0 and e.denominator % 2:
            return self.rational_power(-b, e) * (-1) ** (e.numerator % 2)
        if isinstance(b, Fraction) and b > 0 and e.denominator <= 64 and abs(e.numerator) <= 64:
            top, bottom = (_exact_root(n, e.denominator) for n in b.as_integer_ratio())
            if top and bottom and top.bit_length() * abs(e.numerator) <= MAX_BITS:
                return Fraction(top, bottom) ** e.numerator
        return self.general_power(b, real(e))

    def general_power(self, b, e):
        self.budget.spend(40)
        power = real(e) * SMALL.log(real(b))
        return SMALL.exp(self.small(power, MAX_EXPONENT))

    def small(self, value, limit=10**15):
        if abs(value) > limit or 0 < abs(value) < 1e-50:
            raise NoValue("too large or too small")
        return value

    def _fn(self, name, arguments):
        values = [self.value(node) for node in arguments]
        is_exact = name in _EXACT and all(isinstance(value, Fraction) for value in values)
        self.budget.spend(5 if is_exact or name in ("floor", "ceil", "root", "exp") else 40)
        method = getattr(self, "fn_" + name, None)
        if method is not None:
            try:
                return method(*values)
            except TypeError:
                raise NoValue(f"{name} of {len(values)} arguments") from None
        if name not in _ANALYTIC or len(values) != 1:
            raise NoValue(f"{name} of {len(values)} arguments")
        x = self.small(real(values[0]), 100 if name == "tanh" else 10**15)
        return getattr(SMALL, name)(x)

    def fn_root(self, x, n):
        if not isinstance(n, Fraction) or n == 0:
            raise NoValue("root")
        return self.rational_power(x, 1 / n)

    def fn_exp(self, x):
        return self.general_power(+SMALL.e, x)

    def fn_log(self, x, base=None):
        if x == 0 or base is not None and (base == 0 or base == 1):
            raise NoValue("log")
        log = SMALL.log(real(x))
        return log if base is None else log / SMALL.log(real(base))

    def fn_abs(self, x):
        return abs(x)

    def fn_floor(self, x):
        return Fraction(math.floor(self.small(x, 10**30)))

    def fn_ceil(self, x):
        return Fraction(math.ceil(self.small(x, 10**30)))

    def fn_factorial(self, n):
        if is_integer(n) and n <= MAX_FACTORIAL:
            return Fraction(math.factorial(int(n)))
        return SMALL.gamma(self.small(real(n), 10**6) + 1)

    def fn_binom(self, n, k):
        if is_integer(n) and is_integer(k) and 0 <= n <= MAX_FACTORIAL:
            return Fraction(math.comb(int(n), int(k))) if k >= 0 else Fraction(0)
        return SMALL.binomial(*(self.small(real(value), 10**6) for value in (n, k)))


_EXACT = {"abs", "root", "factorial", "binom"}
_CONSTANTS = {"pi": +SMALL.pi, "e": +SMALL.e, "i": SMALL.j}
_ANALYTIC = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"
}  # fmt: skip


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _exact_root(n: int, k: int) -> int:
    """The k-th root of n when it is an integer, else 0."""
    root = math.isqrt(n) if k == 2 else round(n ** (1 / k)) if n.bit_length() < 900 else 0
    return root if root**k == n else 0
