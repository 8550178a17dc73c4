"""The value of an expression tree of latex.py: exact where possible, else a real or complex number.

The caps below hold before anything is computed: no text makes a number that does not fit into
memory, or takes long.
"""

import math
import operator
from fractions import Fraction

from mpmath.ctx_mp import MPContext

MAX_BITS = 24_000  # of an exact intermediate value
MAX_EXPONENT = 10**6
MAX_FACTORIAL = 3000  # computed exactly; above it by the gamma function
MAX_STEPS = 20_000  # of all evaluations for one verdict

SMALL = MPContext()
SMALL.dps = 40
ROUNDING = SMALL.mpf(10) ** -25  # relative; what differs by less counts as equal


class Undefined(ArithmeticError):
    """No value at this point: division by zero, log 0, infinity."""


class TooHard(ArithmeticError):
    """Exceeds a cap, or is of a kind that has no value here."""


class Budget:
    """The steps that all evaluations for one verdict may take together."""

    def __init__(self, steps: int = MAX_STEPS):
        self.steps = steps

    def spend(self, steps: int) -> None:
        """Raises TooHard when no steps are left."""
        self.steps -= steps
        if self.steps < 0:
            raise TooHard("too many steps")


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


class Evaluation:
    """The value of a tree at a point: a Fraction while exact, then a number of SMALL's precision.

    Raises Undefined or TooHard.
    """

    context = SMALL

    def __init__(self, budget: Budget, point: dict[str, Fraction], real_only: bool = False):
        self.budget = budget
        self.point = point
        self.real_only = real_only  # sqrt(x) is Undefined at x = -1

    def value(self, node: tuple):
        self.budget.spend(1)
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
            self.budget.spend((bits // 1000) ** 2)
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
            value = self.value(node)
            before, total = total, self.both(total, value, operator.add)
            if not isinstance(total, Fraction):
                low, high = sorted((abs(self.real(before)), abs(self.real(value))))
                if 0 < low < high * ROUNDING:
                    raise Undefined("a term is lost beside the others")
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
        self.budget.spend(5 if all(isinstance(value, Fraction) for value in values) else 25)
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
