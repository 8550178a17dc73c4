"""verify.py: what is extracted, what is judged right, and that no text can hang or crash it."""

import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from answers import equality, workers
from answers.equality import check_gold
from tests import fuzz_verify
from verify import (
    answers_match,
    extract_answer,
    verify,
    verify_many,
    verify_math,
)

CASES = [
    json.loads(line)
    for line in Path(__file__)
    .with_name("verify_cases.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
SLOW_INTEGRAL = (
    r"\int_0^{1} \frac{\sin(\sqrt{x})\ln(x+\cos x)}{1+x^5} dx"  # sympy does not finish it
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    id: str = "p"
    kind: str = "math"
    answer: str = ""
    tolerance: float = 0.0
    numbers: tuple[int, ...] = ()
    target: int = 0


# ---- extraction ----


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("72 - 30 = 42\n#### 42", "42"),
        ("#### 1,234", "1,234"),
        ("<answer>42</answer>", "42"),
        ("<answer>\n42\n</answer>", "42"),
        ("The final answer is 42.", "42"),
        ("the answer is: 3/4", "3/4"),
        ("**Answer:** 42", "42"),
        ("I count 3 cats and 4 dogs, so 7 animals in all", "7 animals"),
        ("it costs 1,234 dollars", "1,234 dollars"),
        ("nothing here", None),
        ("", None),
        ("<answer></answer>", None),
    ],
)
def test_extract_answer(text, answer):
    """Would miss or cut the final answer: nested braces, the last of several, a newline after the
    tag, separators."""
    assert extract_answer(text) == answer


def test_extract_answer_many_boxes():
    """Would take quadratic time on thousands of boxes, or not the last."""
    start = time.perf_counter()
    assert extract_answer("\\boxed{1} " * 5000 + "\\boxed{2}") == "2"
    assert time.perf_counter() - start < 1.0


# ---- mathematics ----


@pytest.mark.parametrize(
    "gold, answer, correct",
    [
        ("42", "42", True),
        ("42", "42.0", True),
        ("27.0", "27", True),
        ("42", "41", False),
        ("1,234", "1234", True),
        ("1234", "1,234", True),
        ("1/2", "0.5", True),
        ("0.5", "2/4", True),
        ("-3", "−3", True),
        ("9", "9%", False),
        ("9%", "0.09", True),
        ("1e-7", "2e-7", False),
        ("42", "42.", True),
        ("1/3", "0.3333", False),
        ("1/3", "0.3333333333", True),
    ],
)
def test_answers_match_numbers(gold, answer, correct):
    """Would reward a number that is not equal, or miss an equal one in another notation."""
    assert answers_match(gold, answer).correct is correct


def test_answers_match_empty_gold():
    """Would reward anything, or an empty answer, when the gold answer is empty."""
    assert not answers_match("", "").correct
    assert not answers_match(" ", "42").correct


def judge(case: dict) -> bool:
    if "response" in case:
        return verify_math(case["response"], case["gold"]).correct
    return answers_match(case["gold"], case["answer"], timeout_s=20.0).correct


@pytest.mark.parametrize("name", sorted({case["class"] for case in CASES}))
def test_verify_cases(name):
    """Would misjudge an answer of this class: an equal one in other notation, or a near miss. All
    of the file must pass."""
    failed = [case for case in CASES if case["class"] == name and judge(case) != case["correct"]]
    assert not failed, "\n".join(json.dumps(case) for case in failed)


def test_verify_cases_both_ways():
    """Would let a class of cases pass a verifier that always says yes, or always no."""
    counts = Counter((case["class"], case["correct"]) for case in CASES)
    for name in {case["class"] for case in CASES} - {"unparsable_gold"}:
        assert counts[name, True] and counts[name, False], name


@pytest.mark.parametrize(
    "gold", ["", " ", "$$", "?", "\\frac{1}{", "((", "5+", "\\boxed{}", "x" * 3000]
)
def test_unparsable_gold(gold):
    """Would turn a broken gold answer into a reward for whatever equals it, instead of an error at
    load time."""
    with pytest.raises(ValueError, match="gold"):
        check_gold(gold)
    for answer in (gold, "5", "", "\\boxed{" + gold + "}"):
        verdict = answers_match(gold, answer)
        assert (verdict.correct, verdict.reason) == (False, "unparsable")


@pytest.mark.parametrize(
    "gold",
    [
        "42",
        "\\text{Evelyn}",
        "MR=SRMC",
        "$(-\\infty, 0) \\cup\\{1\\}$.",
        "f(n)=n$, $g(n)=1",
        "12:00",
        "3 bushels",
    ],
)
def test_check_gold_accepts(gold):
    """Would refuse a data set for gold answers that are fine."""
    check_gold(gold)
    assert answers_match(gold, gold).correct


def test_verify_math_reasons():
    """Would report a wrong answer, an unreadable one and a missing one alike."""
    assert verify_math("I cannot tell", "42").reason == "no_answer"
    assert verify_math("\\boxed{41}", "42").reason == "wrong"
    assert verify_math("\\boxed{\\frac{1}{}", "42").reason in ("no_answer", "unparsable")
    assert verify_math("<answer>^_^</answer>", "42").reason == "unparsable"


NAMED_FAULTS = {  # class of verify_cases.jsonl: the fault that its cases would catch
    "last_marker": "an earlier box, tag or thought counts, though a later one, empty or cut off,"
    " withdraws it; an inner box beats the outer, a sign before the box is lost",
    "withdrawn": "what the text denies, doubts or takes back is rewarded",
    "words_beside": "words that change a number (at least, half of, dozen, squared) are dropped",
    "no_marker": "the last number of any text, finished or not, is the answer",
    "choice_letters": "one of several letters, or the first letter of a sentence, is a choice",
    "many_points": "functions that agree at a few points only are equal",
    "close_numbers": "numbers that differ behind the precision are equal",
    "approximations": "each side of an approximation is an answer of its own",
    "and_or": "x > 1 or x < 6 is the interval (1, 6)",
    "question": "an exercise such as 17 * 23 is the number that it asks for",
    "spellings": "escaped backslashes and values behind \\quad are not read",
    "modulo": "3 (mod 7) is 4, or 3 (mod 8)",
    "around_box": "what changes a box's value (at least, half of, a second value) is not read",
    "labelled": "AB : CD = 1 : 2 is 2 : 1, or y / x = x is x",
    "groups": "the values of x = 1, y = 2; x = 3, y = 4 change places",
}


def test_named_faults_have_cases():
    """Would lose the cases of one of the faults above, both right answers and wrong ones."""
    for name in NAMED_FAULTS:
        assert sum(case["class"] == name for case in CASES) >= 6, name


# ---- hostile text and time ----

HOSTILE = [
    "9^{9^{9^{9^9}}}",
    "99**98**97",
    "(10^{10^6})!",
    "3000!^{3000!}",
    "5!!!!!!",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\binom{3000}{1500}^{100}",
    "\\prod_{k=1}^{1000} k^{1000}",
    "\\sum_{k=1}^{1000000000} k",
    "\\sum_{i=1}^{500}\\sum_{j=1}^{500}\\sum_{k=1}^{500} ijk",
    "e^{e^{e^{e^{10}}}}",
    "x^{x^{x^{x^x}}}",
    "(x+y+z+w)^{1000}",
    "(1+x)^{100000}",
    "1e999999",
    "\\sqrt[1000000]{2}",
    "\\sin(10^{10^{5}})",
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "\\frac{1}{" * 200 + "2" + "}" * 200,
    "{" * 10_000 + "1" + "}" * 10_000,
    "(" * 10_000,
    "|" * 5000,
    "9" * 100_000,
    "x" * 100_000,
    "-" * 5000 + "1",
    "+".join(["x"] * 900),
    "1/" * 500 + "1",
    ",".join(["\\sqrt{2}"] * 90),
    "\x00",
    "__import__('os').system('exit')",
    "lambda x: x",
    "eval('1')",
    "\\input{/etc/passwd}",
    "\ud800",
    "$" * 10_000,
    "\\boxed{" * 5000,
    "\\" * 10_000,
    "\\text{" * 1000,
    "answer is " * 10_000,
    "a is " * 20_000,
    "#" * 100_000,
    "\\[" * 50_000,
    "\\boxed{1}, " * 5000,
    "\\begin{pmatrix}" + "1&" * 400 + "1\\end{pmatrix}",
    "\\pm 1" * 100,
    "1/0",
    "0^{-1}",
    "\\infty-\\infty",
    "\\log 0",
    "\\tan(\\frac{\\pi}{2})",
]


@pytest.mark.parametrize("gold", ["42", "x^2+\\sqrt{2}"])
def test_hostile_text(gold):
    """Would raise, hang or be rewarded for text that a policy can produce: towers, factorials, deep
    nesting, code, 100,000 characters."""
    for text in HOSTILE:
        for response in (text, "\\boxed{" + text + "}", "The answer is $" + text):
            start = time.perf_counter()
            assert not verify_math(response, gold, timeout_s=2.0).correct, text[:80]
            assert time.perf_counter() - start < 3.0, text[:80]
        answers_match(text, gold, timeout_s=2.0)


def test_fuzz():
    """Would hold up the calling process: exponential comparison of nested sets, a regex that runs
    over the same text again and again, a budget that some recursion escapes. See fuzz_verify.py;
    the bound leaves room for a loaded machine."""
    rng = random.Random(13)
    texts = [fuzz_verify.random_text(rng) for _ in range(60)]
    texts += [left * 60 + "x" + right * 60 for left, right in fuzz_verify.NESTS]
    texts += [(unit * 2000)[:1990] + "!" for unit in fuzz_verify.REPEATS]
    for i, text in enumerate(texts):
        gold = fuzz_verify.GOLDS[i % len(fuzz_verify.GOLDS)]
        assert fuzz_verify.slowest(text, [gold]) < 1.0, text[:200]


def test_ten_megabytes():
    """Would read all of a text of 10 MB: only its end, and short answers, are looked at."""
    for unit in ("\\boxed{1} ", " ", "$", "(", "the answer is 5. ", "<think>", "1"):
        text = unit * (10**7 // len(unit))
        start = time.perf_counter()
        verify_math(text, "C")
        answers_match("C", text)
        assert time.perf_counter() - start < 1.0, unit


SLOW_IN_PROCESS = [
    "\\sum_{m=1}^{1000}\\sum_{i=0}^{100} \\pi",
    "\\sum_{m=1}^{1000} \\arcsin(e^{(i)^{y}})",
    "\\sum_{i=1}^{9}" * 40 + "i",
    "(" * 55 + "x" + ")^{99}" * 55,
    "\\begin{pmatrix}" + "\\\\".join(["&".join(["\\sqrt{x}"] * 8)] * 8) + "\\end{pmatrix}^6",
    "\\begin{vmatrix}" * 9 + "x&1\\\\1&x" + "\\end{vmatrix}&1\\\\1&1" * 8 + "\\end{vmatrix}",
    "|" * 400 + "x" + "|" * 400,
    "\\{" + ",".join(f"\\sqrt{{{n}}}" for n in range(100)) + "\\}",
    "\\cup".join(f"[{2 * n},{2 * n + 1}]" for n in range(120)),
    "\\begin{cases}" + "1&x>0\\\\" * 150 + "\\end{cases}",
    "5 ft 3 in " * 150,
    "five hundred " * 150,
    "1=(" * 50 + "1" + ")" * 50,
    "]1,2[" * 200,
    "0.(3)" * 200,
]


@pytest.mark.parametrize(
    "gold",
    [
        "42",
        "x^2+\\sqrt{2}",
        "y=2x+1",
        "\\{1,2,\\sqrt{3}\\}",
        "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
        "[0,1)",
    ],
)
def test_hostile_text_in_process(gold):
    """Would block the main process, where nothing is killed at a deadline: matrix powers of
    exponential size, sums of transcendental functions, quadratic matching. 0.15 s was the worst
    when this was written; the bound leaves room for a loaded machine."""
    for text in SLOW_IN_PROCESS:
        start = time.perf_counter()
        assert equality.compare(gold, text) != "correct", text[:80]
        assert time.perf_counter() - start < 1.0, text[:80]


@pytest.mark.parametrize(
    "text",
    [
        "\\exp(1,2)",
        "\\ln(0,z)",
        "\\log_{2}(3,4,5)",
        "\\gcd(1,e)",
        "\\binom{e}{i}",
    ],
)
def test_compare_never_raises(text):
    """Would raise TypeError: an mpmath number compared with a Fraction, a function of too many
    arguments."""
    for pair in ((text, "42"), ("42", text), (text + "+x", "x^2")):
        assert equality.compare(*pair) == "wrong"


def test_verdict_without_history():
    """Would let a verdict depend on what was read or judged before it: a budget or a cache that
    verdicts share. Loading 240 golds once made a correct answer wrong."""
    gold = "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^4"
    costly = "+".join(f"\\sqrt{{{n}}}" for n in range(2, 150))
    pairs = {
        (gold, gold): "correct",
        (costly, costly + "+0"): "correct",
        (costly, costly + "+1"): "wrong",
    }
    for n in range(300):
        check_gold(gold.replace("1", str(n)))
    for _ in range(40):
        for (one, other), reason in pairs.items():
            assert equality.compare(one, other) == reason


def test_nothing_is_executed(tmp_path):
    """Would run code that stands in an answer."""
    marker = tmp_path / "executed"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    for text in (
        code,
        f"\\text{{{code}}}",
        f"\\int_0^1 {code} dx",
        f"\\sum_{{k=1}}^{{\\infty}} {code}",
    ):
        answers_match("42", text)
        answers_match(text, text)
    assert not marker.exists()


def test_verify_imports_no_torch():
    """Would load torch into every worker process."""
    code = "import verify, sys; assert 'torch' not in sys.modules and 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_answers_match_fast():
    """Would make verification a visible share of a step: plain answers must take less than half a
    millisecond."""
    pairs = [
        (c["gold"], c["answer"])
        for c in CASES
        if c["class"] in ("integers", "fractions", "decimals", "roots", "separators")
    ]
    seconds = []
    for gold, answer in pairs * 3:
        equality.read.cache_clear()
        start = time.perf_counter()
        answers_match(gold, answer)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.5e-3


# ---- worker processes ----


def test_worker_killed_at_deadline_and_replaced():
    """Would wait for sympy for ever (SIGALRM does not stop it), or be left without a worker after
    one was killed."""
    assert answers_match("\\int_0^1 x^2 dx", "\\frac{1}{3}", timeout_s=20.0).correct
    pid = workers._idle[-1].process.pid
    start = time.perf_counter()
    assert answers_match(SLOW_INTEGRAL, "42", timeout_s=1.0).reason == "timeout"
    assert time.perf_counter() - start < 2.0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert answers_match("\\int_0^1 x^2 dx", "\\frac{1}{3}", timeout_s=20.0).correct


def test_worker_reused():
    """Would start a process, and import sympy, for every verdict."""
    answers_match("\\int_0^1 x^2 dx", "\\frac{1}{3}", timeout_s=20.0)
    pid = workers._idle[-1].process.pid
    for n in range(3):
        assert answers_match(
            f"\\int_0^1 x^{{{n}}} dx", f"\\frac{{1}}{{{n + 1}}}", timeout_s=20.0
        ).correct
    assert workers._idle[-1].process.pid == pid


def test_worker_death_is_no_reward():
    """Would raise, or hang, when a worker is killed from outside (out of memory)."""
    answers_match("\\int_0^1 x^2 dx", "\\frac{1}{3}", timeout_s=20.0)
    os.kill(workers._idle[-1].process.pid, signal.SIGKILL)
    assert not answers_match("\\int_0^1 x^2 dx", "\\frac{1}{4}", timeout_s=20.0).correct
    assert answers_match("\\int_0^1 x^2 dx", "\\frac{1}{3}", timeout_s=20.0).correct


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_worker_outlives_the_signals_that_stop_a_run(number):
    """Fault: Ctrl-C reaches the workers too, and verdicts of the run's last step read "timeout"."""
    assert answers_match("\\int_0^1 x^2 dx", "\\frac{1}{3}", timeout_s=20.0).correct
    os.kill(workers._idle[-1].process.pid, number)
    time.sleep(0.5)
    assert answers_match("\\int_0^1 x^2 dx", "\\frac{1}{3}", timeout_s=20.0).correct


def test_worker_memory_bounded():
    """Would let one answer take all memory of the machine."""
    answers_match("\\int_0^1 x^2 dx", "\\frac{1}{3}", timeout_s=20.0)
    pid = workers._idle[-1].process.pid
    assert resource.prlimit(pid, resource.RLIMIT_AS) == (workers.MEMORY,) * 2


def test_workers_from_threads():
    """Would mix up answers, or fail, when several threads ask at once (signal-based timeouts work
    in the main thread only)."""
    verdicts = {}
    threads = [
        threading.Thread(
            target=lambda n=n: verdicts.update(
                {
                    n: answers_match(
                        f"\\int_0^1 x^{n} dx", f"1/{n + 1 + n % 2}", timeout_s=20.0
                    ).correct
                }
            )
        )
        for n in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {1: False, 2: True, 3: False, 4: True}


# ---- dispatch ----


def test_verify_many_order_with_workers():
    """Would return verdicts in the order in which the workers finish."""
    problems = [
        Problem(answer="\\int_0^1 x^2 dx"),
        Problem(answer="42"),
        Problem(kind="countdown", numbers=(4, 2), target=2),
        Problem(answer="\\int_0^1 x^2 dx"),
    ]
    responses = ["\\boxed{1/3}", "42", "4 - 2", "\\boxed{1/2}"]
    assert [v.correct for v in verify_many(problems, responses, timeout_s=20.0)] == [
        True,
        True,
        True,
        False,
    ]


def test_verify_dispatch():
    """Would judge a problem by another family's rule."""
    assert verify(Problem(kind="countdown", numbers=(3, 5, 2), target=16), "(3+5)*2").correct
    assert verify(Problem(answer="16"), "so it is 16").correct
    assert verify_math("no number", "16").reason == "no_answer"
    with pytest.raises(ValueError, match="chess"):
        verify(Problem(kind="chess"), "e4")


def test_verify_many_order():
    """Would return verdicts in another order than the responses."""
    problems = [
        Problem(answer=str(i)) if i % 2 else Problem(kind="countdown", numbers=(i,), target=i)
        for i in range(20)
    ]
    responses = [str(i if i % 3 else i + 1) for i in range(20)]
    verdicts = verify_many(problems, responses)
    assert [v.correct for v in verdicts] == [i % 3 != 0 for i in range(20)]
    with pytest.raises(ValueError):
        verify_many(problems, responses[:-1])
