"""The judge of data/countdown.py: which responses are right, wrong, or no derivation."""

import time
from fractions import Fraction

import pytest

from verify import verify_countdown


@pytest.mark.parametrize(
    "response",
    [
        "3 + 5 = 8 , 8 * 2 = 16",
        "3 + 5 = 8; 8 * 2 = 16",
        "3 + 5 = 8\n8 * 2 = 16\n",
        "3 + 5 , 8 * 2",
        "3 + 5 = 8 , 8 * 2 = 16 , 16",
        "(3 + 5) * 2",
        "2*(5+3)",
        "((((3+5))))*2",
        "(3+5)*2 = 16",
        "(3+5)*2 = 16 = 16",
        "(3+5)*2 = 8*2 = 16",
        "(3 + 5) × 2",
        "(3 + 5) · 2 = 16",
        "(3+5)x2",
        r"\boxed{(3+5)\times 2}",
        r"\boxed{\left(3+5\right)\cdot 2 = 16}",
        r"so \( (3+5) \times 2 = 16 \)",
        "$(3+5)*2$",
        "**(3+5)*2**",
        "<answer>(3+5)*2</answer>",
        "<answer>\n(3 + 5) * 2\n</answer>\n",
        "<answer>3+5</answer> no, <answer> (3+5)*2 </answer> done",
        "<think>3*5+2 = 17, too much</think>\n(3+5)*2",
        "I try 3*5.\nThe answer is (3+5)*2.",
        "Answer: (3+5)*2 = 16",
        "3 - 5 = -2\nthat fails\n2 * (3 + 5) = 16",
        "16 = 2 * (3 + 5)",
        "8 = 3 + 5, 16 = 8 * 2",
        "2(5 + 3)",
        "(5 + 3)(2)",
        "<answer>3 + 5 = 8, 8 * 2 = 16\n(3 + 5) * 2 = 16</answer>",
        "<answer>\\boxed{(3+5)*2}</answer>",
        "(3+5)*2 = 16 \\boxed{}",
    ],
)
def test_verify_countdown_accepts(response):
    """Would reject a right derivation because of its notation, its steps, or the text around it (a
    newline after the tag)."""
    assert verify_countdown(response, (3, 5, 2), 16).correct


@pytest.mark.parametrize(
    "response, reason",
    [
        ("3 + 5 = 8 , 8 * 2 = 15", "wrong"),  # stated value
        ("3 + 5 = 9 , 9 * 2 = 18", "wrong"),
        ("(3+5)*2 = 17 = 16", "wrong"),
        ("3 + 5 = 8", "wrong"),  # 2 is left
        ("8 * 2 = 16", "wrong"),  # 8 is not given
        ("3 + 5 = 8 , 8 * 2 = 16 , 16 * 1 = 16", "wrong"),  # 1 is not given
        ("(3+5)*2 , (3+5)*2", "wrong"),  # numbers used twice
        ("(3+5)*2 + 0", "wrong"),
        ("16", "wrong"),
        ("3*5+2", "wrong"),
        ("5*2 = 10, 10 + 3*2 = 16", "wrong"),  # the 2 is off the board
        ("(3+5)*(2/2)*2", "wrong"),
        ("2 / (5 - 5)", "wrong"),
        ("(3+5)/0", "wrong"),
        ("-3 + 5", "wrong"),  # no unary minus
        ("3 + 5 = 8.0001, 8*2 = 16", "wrong"),
        ("35 + 2", "wrong"),  # digits glued together
        ("(3+5)**2", "unparsable"),
        ("99**98**97", "unparsable"),
        ("(3+5)^2", "unparsable"),
        ("16//1", "unparsable"),
        ("(3+5)2", "unparsable"),
        ("(3+5)*2)", "unparsable"),
        ("((3+5)*2", "unparsable"),
        ("3 5 2", "unparsable"),
        ("--3+5*2", "unparsable"),
        ("(3+5)*2 = ", "unparsable"),
        ("(3+5)*2 == 16", "unparsable"),
        ("3! + 5*2", "unparsable"),
        ("1e1 + 3 + 5", "unparsable"),
        (".3 + 5 = 8, 8 * 2 = 16.", "unparsable"),
        ("__import__('os').getcwd()", "unparsable"),
        ("<answer>lambda: 16</answer>", "unparsable"),
        ("I do not know", "unparsable"),
        ("(3+5)*2 \\boxed{3+5}", "wrong"),
        ("15 = (3+5)*2", "wrong"),
        ("<think>\\boxed{(3+5)*2}</think> 3+5+2", "wrong"),
        ("<think>(3+5)*2", "no_answer"),
        (" , ;", "no_answer"),
        ("(3+5)*2 <answer>16</answer>", "wrong"),
        ("<answer></answer>", "no_answer"),
        ("", "no_answer"),
        (" \n ", "no_answer"),
    ],
)
def test_verify_countdown_rejects(response, reason):
    """Would reward a wrong derivation: numbers reused or invented, a false stated value, or syntax
    that is not + - * / and parentheses."""
    verdict = verify_countdown(response, (3, 5, 2), 16)
    assert (verdict.correct, verdict.reason) == (False, reason)


def test_verify_countdown_without_a_step():
    """Fault: separators alone leave a board of one number as it is, and earn the reward."""
    for text in (",", ";;", "\\boxed{,}", "<answer>;</answer>", " \n,"):
        assert not verify_countdown(text, (5,), 5).correct, text


def test_verify_countdown_exact_rationals():
    """Floats would call 8 / (3 - 8/3) not quite 24, and accept a quotient that is only nearly
    right."""
    assert verify_countdown("8 / (3 - 8/3)", (3, 3, 8, 8), 24).correct
    assert (
        verify_countdown("8/3 = 8/3, 3 - 8/3", (3, 3, 8), Fraction(1, 3)).correct is False
    )  # the board then holds 8/3 as one number
    assert verify_countdown(r"\frac{8}{3 - \frac{8}{3}} = 24", (3, 3, 8, 8), 24).correct
    assert not verify_countdown("1/3 = 0.333, 3*4", (1, 3, 3, 4), 4).correct
    assert not verify_countdown(
        "100000000000000000/3*3+1", (100000000000000000, 3, 3, 1), 100000000000000000
    ).correct


def test_verify_countdown_negative_intermediate():
    """Would lose a derivation that passes through a negative number, or lend a sign to a given
    one."""
    assert verify_countdown("3 - 5 = -2, -2 + 18 = 16", (3, 5, 18), 16).correct
    assert verify_countdown("3 - 5 = -2, 18 + -2 = 16", (3, 5, 18), 16).correct
    assert not verify_countdown(
        "3 - 5 = -2, 18 - 2 = 16", (3, 5, 18), 16
    ).correct  # 2 is not on the board, -2 is


def test_verify_countdown_brute_force():
    """Would misjudge precedence, associativity or the use of a number: every tree on three numbers,
    judged by Python's own Fractions."""
    operators = {
        "+": Fraction.__add__,
        "-": Fraction.__sub__,
        "*": Fraction.__mul__,
        "/": Fraction.__truediv__,
    }
    numbers = (6, 4, 3)
    a, b, c = map(Fraction, numbers)
    for o, f in operators.items():
        for p, g in operators.items():
            left, right = g(f(a, b), c), f(a, g(b, c))
            flat = left if (o in "*/" or p in "+-") else right
            for text, value in (
                (f"(6{o}4){p}3", left),
                (f"6{o}(4{p}3)", right),
                (f"6 {o} 4 {p} 3", flat),
            ):
                assert verify_countdown(text, numbers, value).correct
                assert not verify_countdown(text, numbers, value + 1).correct
                assert not verify_countdown(text, (6, 4, 4), value).correct


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "(" * 300 + "3" + ")" * 300,
        "9" * 100_000,
        "1*" * 50_000 + "1",
        "-" * 1000,
        "\x00",
        "3 + 5 = 8, " * 10_000,
        "\\boxed{" * 5000 + "}" * 5000,
        "\\frac" * 200,
        "<answer>" * 20_000,
        "9" * 900 + "*" + "9" * 50,
        "\\boxed" * 20_000,
    ],
)
def test_verify_countdown_hostile(text):
    """Would hang, overflow the stack or raise on text that a policy can produce."""
    start = time.perf_counter()
    assert not verify_countdown(text, (3, 5, 2), 16).correct
    assert time.perf_counter() - start < 1.0


def test_verify_countdown_fast():
    """Would make verification a visible share of a step of the tiny model: more than 50
    microseconds for a two-step derivation."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            verify_countdown("3 + 5 = 8 , 8 * 2 = 16", (3, 5, 2), 16)
        seconds.append((time.perf_counter() - start) / 200)
    assert min(seconds) < 50e-6
