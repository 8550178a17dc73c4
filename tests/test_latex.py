"""latex.py, evaluation.py, units.py: what parses to what, exact values, and the caps."""

import time
from fractions import Fraction

import pytest

from answers.evaluation import Budget, Evaluation, NoValue, variables
from answers.latex import MAX_DEPTH, MAX_DIGITS, NotMath, normalise, parse


def value(text: str, **point):
    numbers = {name: Fraction(number) for name, number in point.items()}
    return Evaluation(Budget(), numbers).value(parse(text))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1 - 2 - 3", -4),
        ("2 - 3 + 4", 3),
        ("12 / 2 / 3", 2),
        ("12 / 2 * 3", 18),
        ("-2^2", -4),
        ("(-2)^2", 4),
        ("2^3^2", 512),
        ("2^{-1}", Fraction(1, 2)),
        ("2^-1", Fraction(1, 2)),
        ("x^10", 1024),
        ("-x^2", -4),
        ("2x^2", 8),
        ("2(x+1)", 6),
        ("(x+1)(x-1)", 3),
        ("3x/2", 3),
        ("\\frac{1}{2}x", 1),
        ("\\frac12", Fraction(1, 2)),
        ("\\frac1{12}", Fraction(1, 12)),
        ("\\sqrt4", 2),
        ("\\sqrt49", 18),
        ("\\sqrt[3]{-8}", -2),
        ("4^{1/2}", 2),
        ("8^{-2/3}", Fraction(1, 4)),
        ("3!", 6),
        ("(x+1)!", 6),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("2\\frac{3}{2}", 3),
        ("x\\frac{1}{2}", 1),
        ("50\\%", Fraction(1, 2)),
        ("1.5e3", 1500),
        ("|-3|", 3),
        ("|1-|-4||", 3),
        ("\\lfloor 7/2 \\rfloor", 3),
        ("\\lceil -7/2 \\rceil", -3),
        ("\\binom{5}{2}", 10),
        ("1{,}234", 1234),
        ("2^{3} 3^{2}", 72),
        ("2! 3!", 12),
    ],
)
def test_value_exact(text, expected):
    """Would get precedence, implicit multiplication, a malformed command or an exact value wrong;
    floats would show in the type."""
    result = value(text, x=2)
    assert isinstance(result, Fraction) and result == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\\sin 2x", "0.9092974268"),
        ("\\sin x \\cos x", "0.4546487134"),
        ("\\sin^2 x", "0.7080734183"),
        ("\\sin(x)^2", "0.7080734183"),
        ("\\sin^{-1} x", "1.5707963268"),
        ("\\ln x + 1", "1.0"),
        ("\\log_{10} 1000", "3.0"),
        ("e^{2x}", "7.3890560989"),
        ("\\sin 30^\\circ", "0.5"),
        ("2\\pi", "6.2831853072"),
    ],
)
def test_value_real(text, expected):
    """Would read sin 2x cos x or sin^2 x as something else."""
    assert abs(value(text, x=1) - float(expected)) < 1e-9


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        ")",
        "(1",
        "1)",
        "[1)2",
        "\\frac{1}",
        "\\frac{1}{",
        "1 +",
        "* 2",
        "1 2",
        "x^",
        "x_",
        "\\unknown{3}",
        "\\int x",
        "\\begin{pmatrix}1&2\\\\3\\end{pmatrix}",
        "()",
        "[1)",
        "[1,2,3)",
        "\\frac{1}{2}1",
        "\\lfloor 3,7 \\rfloor",
        "a ? b",
        "\x00",
        "__import__('os')",
    ],
)
def test_parse_rejects(text):
    """Would read half of a text and ignore the rest."""
    with pytest.raises(NotMath):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "{" * 1000 + "1" + "}" * 900,
        "9" * (MAX_DIGITS + 1),
        "1e999999",
        "x " * 1500,
        "-" * 1500 + "1",
        "\\sqrt{" * 100 + "1" + "}" * 100,
        "2^" * 100 + "2",
        "((" * 1000,
    ],
)
def test_caps_of_the_parser(text):
    """Would overflow the stack, or build a number of millions of digits, while parsing."""
    start = time.perf_counter()
    with pytest.raises(NotMath):
        parse(text)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}",
        "10^{10^7}",
        "(10^9)!",
        "e^{10^9}",
        "\\sum_{k=1}^{10^9} k",
        "\\sin(10^{300})",
        "5!!!!",
        "\\exp(1,2)",
    ],
)
def test_caps_of_the_evaluation(text):
    """Would try to compute a number that does not fit into memory."""
    start = time.perf_counter()
    with pytest.raises(NoValue):
        value(text)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "text",
    [
        "1/0",
        "0^{-1}",
        "\\log 0",
        "\\infty",
        "\\infty - \\infty",
        "\\log_1 5",
        "\\frac{x}{x-2}",
        "(-1)!",
    ],
)
def test_undefined(text):
    """Would take an undefined value for a number."""
    with pytest.raises((ArithmeticError, ValueError)):
        value(text, x=2)


def test_budget_is_shared():
    """Would let an answer of many parts spend the budget of one evaluation on each."""
    node = parse("+".join(["k^2"] * 100))
    budget = Budget(2000)
    with pytest.raises(NoValue):
        for _ in range(10):
            Evaluation(budget, {"k": Fraction(3)}).value(node)


def test_lost_term():
    """Would call e^350 + 1 equal to e^350, as 150 digits do not hold the difference."""
    for text in ("e^{350}+1", "2^{60000}-1", "\\pi+10^{-150}"):
        with pytest.raises(NoValue):
            value(text)


def test_variables_bound():
    """Would count the variable of an integral, or miss one, when looking for random points."""
    assert variables(parse("\\alpha + \\int_1^n k x_1 dk")) == {"n", "x_1", "\\alpha"}
    assert variables(parse("2\\pi e^i")) == set()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1\\,234", "1234"),
        ("1{,}234", "1234"),
        ("$5$", " 5"),
        ("½", "\\frac{1}{2}"),
        ("x^½", "x^\\frac{1}{2}"),
        ("13⁄4", "13/4"),
        ("2½", "(2+1/2)"),
        ("0.1(6)", "0.1\\overline{6}"),
        ("xⁿ", "x^{n}"),
        ("2ᵏ", "2ᵏ"),
        ("５，０００", "5,000"),
        ("4 2.", "4 2"),
        ("x = 5.", "x = 5"),
    ],
)
def test_normalise(text, expected):
    """Would leave a spelling that the parser does not know."""
    assert normalise(text) == expected


@pytest.mark.parametrize(
    "text, powers",
    [
        ("5 cm", ((1, "cm"),)),
        ("5 \\text{ centimeters}", ((1, "cm"),)),
        ("5 \\text{ km/h}", ((-1, "h"), (1, "km"))),
        ("5 kilometers per hour", ((-1, "h"), (1, "km"))),
        ("5 m/s", ((-1, "s"), (1, "m"))),
        ("5 \\text{ square feet}", ((2, "ft"),)),
        ("5 \\mathrm{~m} \\mathrm{~s}^{-2}", ((-2, "s"), (1, "m"))),
        ("5 apples", ((1, "apple"),)),
    ],
)
def test_unit(text, powers):
    """Would lose a unit's power, take its plural or another name of it for another unit, or read a
    unit as a product of variables."""
    assert parse(text) == ("unit", ("num", 5, 0), powers)
