"""Text that tries to hold the verifier up: nesting of every construct, and each regex's worst case.

python tests/fuzz_verify.py [seconds] [seed]: random combinations for that long (60 by default);
prints what takes more than LIMIT_S. tests/test_fuzz.py runs a fixed set.
"""

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from answers.equality import compare
from answers.extract import extract_answer
from verify import verify_countdown

LIMIT_S = 0.1  # in the calling process
NESTS = [  # what opens, what closes
    *[("(", ")"), ("[", "]"), ("{", "}"), ("\\{", "\\}"), ("|", "|"), ("\\lfloor ", "\\rfloor ")],
    *[("1=(", ")"), ("1=\\{1,", "\\}"), ("x=\\{1,", "\\}"), ("1\\approx (", ")"), ("\\pm(", ")")],
    *[("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("\\sqrt[", "]{2}"), ("2^{", "}"), ("x^{", "}")],
    *[("\\text{", "}"), ("\\bm{", "}"), ("\\overline{", "}"), ("\\boxed{", "}"), ("x_{", "}")],
    *[("\\sin(", ")"), ("\\ln(", ")"), ("\\binom{n}{", "}"), ("(-1)^{", "}"), ("\\log_{", "}2")],
    *[("(1,", ")"), ("(x<1,", ")"), ("[0,1]\\cup(", ")"), ("(x=1,y=", ")"), ("(1\\pmod{", "})")],
    *[("\\begin{pmatrix}1&", "\\end{pmatrix}"), ("\\int_0^1 ", " dx"), ("\\left(", "\\right)")],
    *[("x>1 and (", ")"), ("5 \\text{ m}(", ")"), ("-(", ")"), ("(", ")!"), ("(x+y)(", ")")],
    *[("1=-2/(x+", ")^2"), ("\\{a=1 \\text{ or } ", "\\}"), ("<answer>", "</answer>")],
    *[("C(10,", ")"), ("x=1,y=(", ")"), ("\\frac{AB}{", "}=2"), ("S:T=(", ")"), ("2x>(", ")")],
]
CORES = ["1", "x", "n", "\\sqrt{2}", "x=1", "1,2", "\\pm 2", "e", "\\pi", "x>1", ""]
REPEATS = [  # what a regex might run over again and again
    *["1", "9.", "a", " ", "$", "\\", "{", "}", "(", ")", ",", "-", "|", "\n", ".", "_", "^", "'"],
    *["1a", "1aand ", "and ", "or ", ", ", "1 ", "1,000", "1 000", "1.1", "0.(3)", "...", "(A) "],
    *["\\text{a}", "\\, ", "\\ ", "\\frac", "\\boxed{", "\\boxed{1}", "\\boxed ", "\\boxed{1}, "],
    *["#### 1\n", "####", "answer", "answer is ", "Answer: 5. ", "answer to ", "<answer>"],
    *["</think>", "<think>"],
    *["\\[", "\\[1\\]", "$$", "$1$", "$1$ and ", "is ", "so ", "the ", "not ", "a-", "m ",
      "\\circ", "^\\circ", "\\prime", "\\mod ", "(mod 7)", "x 10^", "1/", "1-", "A. ", "¹", "½"],
    *["C(1,", "p=1,q=2;", "S:", "5 per cent ", "$5 ", "2x>", "x>2 or "],
    *["&", "\\\\", "\\cup ", "\\infty", "e^", "n!", "\\ln x ", "x=", "x<", "A", "I hope it is "],
]  # fmt: skip
GOLDS = ["42", "C", "\\{1,2\\}", "x^2+\\sqrt{2}", "(0,1)", "\\lfloor n/7 \\rfloor", "x=1,y=2",
         "5 \\text{ cm}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "x>1"]  # fmt: skip


def slowest(text: str, golds: list[str]) -> float:
    """The CPU seconds of the slowest call with this text: as a response, an answer and a gold."""
    calls = [lambda: extract_answer(text), lambda: verify_countdown(text, (3, 5, 2), 16)]
    for gold in golds:
        calls += [lambda gold=gold: compare(gold, text), lambda gold=gold: compare(text, gold)]
    calls += [lambda: compare(text, text + " "), lambda: compare(text, text.replace("1", "2"))]
    seconds = []
    for call in calls:
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return max(seconds)


def nested(depth: int, rng: random.Random, kinds: int) -> str:
    pairs = [rng.choice(NESTS) for _ in range(kinds)]
    pairs = [pairs[i % kinds] for i in range(depth)]
    opening, closing = "".join(p[0] for p in pairs), "".join(p[1] for p in reversed(pairs))
    return opening + rng.choice(CORES) + closing


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        text = nested(rng.randint(1, 60), rng, rng.randint(1, 4))
        return text if rng.random() < 0.7 else text * rng.randint(2, 6)
    parts = [rng.choice(REPEATS) * rng.choice((1, 40, 400, 1900)) for _ in range(3)]
    return "".join(parts)[: rng.choice((250, 1999, 10**5))] + rng.choice(("", "!", "\\", "}", "1"))


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    end, worst, count = time.monotonic() + seconds, 0.0, 0
    while time.monotonic() < end:
        text = random_text(rng)
        golds, count = [rng.choice(GOLDS)], count + 1
        found = slowest(text, golds)
        if found > LIMIT_S:  # again: the garbage collector may have run
            found = min(found, slowest(text, golds))
        worst = max(worst, found)
        if found > LIMIT_S:
            print(f"{found:.2f} s: {text[:200]!r} ({len(text)} characters)", flush=True)
    print(f"{count} texts, the slowest call {worst:.3f} s")


if __name__ == "__main__":
    main()
