"""The cases of the verifiers: responses that are right, and near misses.

Whether a case is right is known here, by the way that it is made; make.py asks the verifier, and
a test compares both, and an oracle: brute force, and math-verify.
"""

import random
from fractions import Fraction

from golden.cases import EXACT, document

# ---- Countdown

# id, flag, response, numbers, target, whether it is right
GAMES = [
    ("divisor of zero", "division_by_zero", "5 / (3 - 3)", [3, 3, 5], 0, False),
    ("zero by zero", "division_by_zero", "(4 - 4) / (2 - 2)", [4, 4, 2, 2], 1, False),
    ("two equal numbers", "number_reused", "3 * 3 - 2", [3, 2, 3], 7, True),
    ("three of two numbers", "number_reused", "3 * 3 - 3", [3, 3], 6, False),
    ("fraction on the way", "integer_division", "7 / 2 * 4", [2, 4, 7], 14, True),
    ("fraction rounded down", "integer_division", "7 / 2 * 4", [2, 4, 7], 12, False),
    ("tenths", "division_in_floats", "1 / 10 * 3 * 10", [1, 10, 3, 10], 3, True),
    ("divided by infinity", "division_by_zero", "3 + 2 / (5 / (4 - 4))", [2, 3, 4, 4, 5], 3, False),
    (
        "large products",
        "division_in_floats",
        "94906267 * 94906267 - 94906266 * 94906268",
        [94906266, 94906267, 94906267, 94906268],
        1,
        True,
    ),
    ("used before made", "foreign_number", "8 * 2 = 16, 3 + 5 = 8", [2, 3, 5], 16, False),
    ("bracket behind it", "rest_ignored", "3 + 5 = 8)", [3, 5], 8, False),
    ("number behind it", "rest_ignored", "3 + 5 8", [3, 5], 8, False),
    (
        "empty steps",
        "right_derivation_rejected",
        "3 * 5 = 15,\n \n15 + 2 = 17, ",
        [2, 3, 5],
        17,
        True,
    ),
    (
        "brace behind the box",
        "right_derivation_rejected",
        r"\boxed{3 * 4} from {3, 4}",
        [3, 4],
        12,
        True,
    ),
    (
        "two thoughts",
        "thought_judged",
        "<think>3 + 4</think> No. <think>3 - 4</think> 3 * 4",
        [3, 4],
        12,
        True,
    ),
    ("power", "other_operator", "2 ^ 4", [2, 4], 16, False),
    ("factorial", "other_operator", "4! - 3", [3, 4], 21, False),
    ("digits joined", "foreign_number", "23 + 4", [2, 3, 4], 27, False),
    ("negative step", "right_derivation_rejected", "3 - 5 = -2, 8 + -2 = 6", [3, 5, 8], 6, True),
    ("product first", "operators_left_to_right", "2 + 3 * 4", [2, 3, 4], 14, True),
    ("sum first", "operators_left_to_right", "2 + 3 * 4", [2, 3, 4], 20, False),
    ("product before sum", "operators_left_to_right", "2 * 3 + 4", [2, 3, 4], 10, True),
    ("from the left", "operators_left_to_right", "9 - 4 - 2", [9, 4, 2], 3, True),
    ("from the right", "operators_left_to_right", "9 - 4 - 2", [9, 4, 2], 7, False),
    ("code", "text_evaluated", "__import__('os').getpid() * 0 + 5", [5], 5, False),
    ("right box last", "first_answer_judged", r"\boxed{3 + 4} No. \boxed{3 * 4}", [3, 4], 12, True),
    (
        "wrong box last",
        "first_answer_judged",
        r"\boxed{3 * 4} No. \boxed{3 + 4}",
        [3, 4],
        12,
        False,
    ),
    ("semicolon", "separator_unknown", "2 * 3 = 6; 6 + 4 = 10", [2, 3, 4], 10, True),
    ("box without end", "unclosed_box_accepted", r"It is \boxed{3 * 4", [3, 4], 12, False),
    ("number restated", "stated_number_on_board", "3 = 3, 3 * 4 = 12", [3, 4], 12, True),
    ("value restated", "stated_number_on_board", "6 = 2 * 3, 6 * 2 * 3 = 36", [2, 3, 6], 36, True),
    ("chain of products", "chain_side_taken", "3 * 4 = 2 * 6 = 12", [3, 4], 12, True),
    ("plus sign", "unary_plus", "+3 * 4 = 12", [3, 4], 12, False),
    ("tag in open thought", "thought_judged", "<think><answer>3 * 4</answer>", [3, 4], 12, False),
    (
        "tag without end",
        "open_tag_overlooked",
        "<answer>3 * 4</answer> No. <answer>3 + 4",
        [3, 4],
        12,
        False,
    ),
    ("many brackets", "verifier_hangs", "(" * 5000 + "5" + ")" * 5000, [5], 5, False),
]

SIGNS = {"*": " * ", "+": " + ", "-": " - ", "/": " / "}


def countdown() -> list[tuple[str, str, str, dict, bool]]:
    """(id, flags, about, inputs, whether it is right): ten responses to each of thirty games, and
    some of their own."""
    rows = []
    for name, flag, text, numbers, target, correct in GAMES:
        about = f"{name.capitalize()}: {'right' if correct else 'wrong'}."
        inputs = {"response": text, "numbers": numbers, "target": target}
        rows.append((name.replace(" ", "_"), flag, about, inputs, correct))
    rng = random.Random(0)
    for number in range(30):
        numbers, target, steps, expression = game(rng, 3 + number % 3)
        made = right(numbers, target, steps, expression)
        wrong = misses(numbers, target, steps, expression)
        for kind, responses, correct in (("right", made, True), ("wrong", wrong, False)):
            names = sorted(responses)
            for n in range(5):
                name = names[(5 * number + n) % len(names)]
                flags, about, text, *other = responses[name]
                inputs = {"response": text, "numbers": numbers, "target": (*other, target)[0]}
                rows.append((f"{kind}_{number}_{name}", flags, about, inputs, correct))
    return rows


def game(rng: random.Random, count: int) -> tuple[list[int], int, list[tuple], str]:
    """Random numbers, a target, the steps (a, operator, b, value) to it, and one expression."""
    while True:
        numbers = rng.sample(range(2, 26), count)
        board = [(Fraction(n), str(n)) for n in numbers]
        steps = []
        while len(board) > 1:
            (a, left), (b, right_) = (board.pop(rng.randrange(len(board))) for _ in range(2))
            operator = rng.choice("+-**/")
            if operator == "/" and (b == 0 or a % b):
                operator = "+"
            value = {"+": a + b, "-": a - b, "*": a * b}.get(operator)
            value = a / b if value is None else value
            steps.append((int(a), operator, int(b), int(value)))
            board.append((value, f"({left}{SIGNS[operator]}{right_})"))
        values = [step[3] for step in steps]
        if min(values) > 1 and max(values) < 1000 and sum(numbers) != values[-1]:
            return numbers, values[-1], steps, board[0][1][1:-1]


def derivation(steps: list[tuple], separator: str = ", ") -> str:
    return separator.join(f"{a}{SIGNS[op]}{b} = {value}" for a, op, b, value in steps)


def right(numbers: list[int], target: int, steps: list[tuple], expression: str) -> dict:
    tex = expression.replace("*", r"\times").replace("/", r"\div")
    signs = expression.replace("*", "×").replace("/", "÷")
    flag = "right_derivation_rejected"
    return {
        "steps": (flag, "One step for each operator.", derivation(steps)),
        "lines": (flag, "A step on each line.", derivation(steps, "\n")),
        "expression": (flag, "One expression.", expression),
        "equation": (flag, "The expression and its value.", f"{expression} = {target}"),
        "value_first": (flag, "The value and the expression.", f"{target} = {expression}"),
        "tag": (flag, "The text in the answer tag is judged.", f"<answer>{expression}</answer>"),
        "box": (flag, "The text in the box is judged.", rf"It is \boxed{{{tex}}}."),
        "signs": (flag, "Typographic signs.", signs),
        "thought": (
            flag,
            "What stands behind </think> is judged.",
            f"<think>{numbers[0]} + {numbers[1]} is too small</think>\n{derivation(steps)}",
        ),
        "last_tag": (
            flag,
            "The last answer tag counts.",
            f"<answer>{numbers[0]} + {numbers[1]}</answer> No. <answer>{expression}</answer>",
        ),
    }


def misses(numbers: list[int], target: int, steps: list[tuple], expression: str) -> dict:
    a, operator, b, value = steps[-1]
    first = numbers[0]
    false = [*steps[:-1], (a, operator, b, value + 1)]
    joined = int(f"{numbers[0]}{numbers[1]}")
    rest = "".join(f" + {n}" for n in numbers[2:])
    return {
        "false_step": (
            "wrong_arithmetic",
            "The last step states the target, but it is false.",
            derivation(false),
            target + 1,
        ),
        "false_stated": (
            "wrong_arithmetic",
            "The last step states a false value; the true one is the target.",
            derivation(false),
        ),
        "false_value": (
            "wrong_arithmetic",
            "The stated value is the target, the expression's is not.",
            f"{expression} = {target + 1}",
            target + 1,
        ),
        "other_target": (
            "wrong_target",
            "A true derivation of another number.",
            derivation(steps),
            target - 1,
        ),
        "step_missing": (
            "number_left_out",
            "The steps reach the target, but a number is left over.",
            derivation(steps[:-1]),
            steps[-2][3],
        ),
        "only_the_target": (
            "number_left_out",
            "The target alone uses no number.",
            f"<answer>{target}</answer>",
        ),
        "used_twice": (
            "number_reused",
            "A number is multiplied and divided away: it is used three times.",
            f"({expression}) * {first} / {first}",
        ),
        "foreign_one": (
            "foreign_number",
            "A factor of 1, which is not among the numbers.",
            f"({expression}) * 1",
        ),
        "foreign_zero": (
            "foreign_number",
            "A 0 is added, which is not among the numbers.",
            f"({expression}) + 0 = {target}",
        ),
        "digits_joined": (
            "foreign_number",
            "Two numbers written as one.",
            f"{joined}{rest}",
            joined + sum(numbers[2:]),
        ),
        "division_by_zero": (
            "division_by_zero",
            "A division by zero is never right.",
            f"({expression}) / ({first} - {first})",
        ),
        "chain": (
            "chained_equality",
            "A false value between two true ones.",
            f"{expression} = {target + 1} = {target}",
        ),
        "unclosed_thought": (
            "thought_judged",
            "A thought that is not closed is no answer.",
            f"<think>{expression} = {target}",
        ),
        "right_then_wrong": (
            "first_answer_judged",
            "The last answer tag counts, and it is wrong.",
            f"<answer>{expression}</answer><answer>{numbers[0]} + {numbers[1]}</answer>",
        ),
        "empty": ("no_answer_accepted", "Nothing.", ""),
        "words": ("no_answer_accepted", "No derivation.", f"The target is {target}, so we win."),
    }


# ---- mathematics: (flags, gold, right answers, wrong answers)

ANSWERS = [
    ("right_number_rejected", "42", ["42", "42.0", "$42$", "+42", "42.", r"\(42\)"],
     ["-42", "43", "420", "4.2", "42!", "2"]),
    ("right_number_rejected", "-7", ["-7", r"\(-7\)", "-7.0"], ["7", "-7.1", r"-\frac{7}{2}"]),
    ("right_number_rejected", "1234", ["1,234", "1234.0", "1{,}234"], ["1235", "123.4"]),
    ("right_number_rejected", "0", ["0", "0.0"], ["1", "0.01", ""]),
    ("right_number_rejected", "1000000", ["10^6", "1,000,000", r"1 \times 10^{6}"],
     ["10^5", "100,000", "10^7"]),
    ("decimal_for_fraction", r"\frac{3}{4}", ["3/4", "0.75", r"\dfrac{3}{4}", r"\frac{6}{8}"],
     ["4/3", "0.74", "-3/4", "3.4"]),
    ("rounded_number_accepted", "1/3", [r"\frac13", r"\frac{1}{3}", "2/6"],
     ["0.33", "0.3", "3", "0.34"]),
    ("decimal_for_fraction", "0.5", ["1/2", r"\frac{1}{2}", ".5", "0.50"],
     ["5", "0.05", "-0.5", "0.51"]),
    ("mixed_number", "2.75", ["11/4", r"2\frac{3}{4}"], ["2.7", "11/3", r"2\frac{1}{4}"]),
    ("mixed_number", "7/2", ["3.5", r"3\frac{1}{2}"], [r"3\frac{1}{3}", "2/7"]),
    ("rounded_number_accepted", r"2\sqrt{3}",
     [r"\sqrt{12}", r"2 \sqrt 3", r"\sqrt{3} \cdot 2", r"\frac{6}{\sqrt{3}}"],
     [r"3\sqrt{2}", r"\sqrt{6}", "3.46", r"-2\sqrt{3}", r"2\sqrt[3]{3}"]),
    ("rounded_number_accepted", r"\frac{\sqrt{2}}{2}",
     [r"\frac{1}{\sqrt{2}}", r"\sqrt{\frac{1}{2}}", r"\frac{\sqrt 2}{2}"],
     [r"\sqrt{2}", "0.7", r"\frac{\sqrt{2}}{4}", "0.707"]),
    ("root_lost", r"1+\sqrt{5}", [r"\sqrt{5}+1"], [r"1-\sqrt{5}", r"\sqrt{6}", "3.23"]),
    ("root_lost", r"\sqrt{2}+\sqrt{3}", [r"\sqrt{3}+\sqrt{2}", r"\sqrt{5+2\sqrt{6}}"],
     [r"\sqrt{5}", "3.146"]),
    ("constant_lost", r"4\pi", [r"\pi \cdot 4", r"4 \pi", r"\frac{8\pi}{2}"],
     ["4", "12.56", r"\pi^4", r"4\pi^2"]),
    ("constant_lost", r"\frac{\pi}{6}", [r"\pi/6", r"\frac{1}{6}\pi"],
     [r"\frac{\pi}{3}", "0.52", r"\frac{6}{\pi}"]),
    ("power_lost", "2^{10}", ["1024", "2^{10}"], ["2^{11}", "20", "10^2"]),
    ("expression_as_text", "x^2+2x+1", ["(x+1)^2", "1+2x+x^2", "x(x+2)+1"],
     ["x^2+2x-1", "(x-1)^2", "x^2+1", "X^2+2X+1"]),
    ("expression_as_text", r"\frac{x+1}{x-1}",
     [r"-\frac{x+1}{1-x}", "(x+1)/(x-1)", r"1+\frac{2}{x-1}"],
     [r"\frac{x-1}{x+1}", r"\frac{x+1}{1-x}", "x+1"]),
    ("expression_as_text", "2n+1", ["1+2n", "n+(n+1)"], ["2n-1", "2(n+1)", "2m+1"]),
    ("expression_as_text", "e^{2x}", ["(e^x)^2"], ["e^{x^2}", "2e^x", "e^{2}x"]),
    ("expression_as_text", r"\ln 2", [r"\ln(2)", r"-\ln\frac{1}{2}"], [r"\ln 3", "0.69", "2"]),
    ("expression_as_text", r"\sin x", [r"\sin(x)"], [r"\cos x", "x"]),
    ("expression_as_text", "3a^2b", ["3 b a^2", r"3 \cdot a^2 \cdot b"],
     ["3ab^2", "3a^2+b", "9a^2b"]),
    ("order_ignored", "(1, 2)", ["(1,2)", r"\left(1, 2\right)", "(1.0, 2.0)"],
     ["(2, 1)", "(1, 2, 3)", r"\{1, 2\}", "(1, -2)", "1"]),
    ("order_ignored", r"(3, -1, \frac{1}{2})", ["(3,-1,0.5)"], ["(3,1,1/2)", "(3,-1)"]),
    ("set_as_list", r"\{1, 2, 3\}", [r"\{3, 2, 1\}", r"\{1,2,3\}"],
     [r"\{1, 2\}", r"\{1,2,3,4\}", "(1,2,3)", r"\{1, 2, 4\}"]),
    ("part_accepted", "1, 2", ["2, 1", "1,2"], ["1", "1, 3", "1, 2, 3"]),
    ("part_accepted", "-3, 5", ["5, -3"], ["3, 5", "-3", "-5, 3"]),
    ("part_accepted", r"\pm 2", ["2, -2", r"\pm2"], ["2", "-2", "4"]),
    ("interval_ends", "[0, 1)", ["[0,1)", r"\left[0, 1\right)"],
     ["(0, 1]", "[0, 1]", "(0, 1)", "[0, 2)"]),
    ("interval_ends", r"(-\infty, 3]", [r"(-\infty,3]", r"x \le 3", r"x \leq 3"],
     [r"(-\infty, 3)", r"[3, \infty)", "x < 3", r"x \geq 3"]),
    ("part_accepted", r"(-1, 1) \cup (2, 3)", [r"(2,3) \cup (-1,1)"],
     ["(-1, 3)", "(-1,1)", r"(-1, 1] \cup (2, 3)"]),
    ("interval_ends", "x > 2", [r"(2, \infty)", "2 < x"],
     [r"x \geq 2", "x < 2", r"[2, \infty)"]),
    ("name_ignored", "x = 5", ["5", "x=5"], ["x = -5", "y = 5", "x = 6"]),
    ("equation_sides", "y = 2x + 1", ["y=2x+1", "y - 2x = 1", "2x - y + 1 = 0"],
     ["y = 2x - 1", "y = x + 2", "y=2x"]),
    ("equation_sides", "x^2 + y^2 = 25", ["y^2 + x^2 = 25", "x^2+y^2-25=0"],
     ["x^2 - y^2 = 25", "x^2 + y^2 = 5"]),
    ("percent", r"25\%", ["25%", "0.25", "1/4"], ["2.5%", "250%", "0.025"]),
    ("percent", "25", ["25"], ["25%"]),
    ("unit_ignored", r"12 \text{ cm}", ["12", "12 cm"], ["12 km", "13 cm", "12 kg", "1.2"]),
    ("unit_ignored", "5", [r"5 \text{ apples}", "5 meters"],
     ["5 dozen", "at least 5", "half of 5"]),
    ("unit_ignored", r"\$18", ["18", "18 dollars", r"\$18.00"], [r"\$1.8", "81"]),
    ("choice", "C", ["(C)", "C", r"\text{C}"], ["D", "(B)", "A"]),
    ("choice", r"\text{Tuesday}", ["Tuesday", "tuesday"], ["Thursday", "Monday"]),
    ("matrix_entries", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
     [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"],
     [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", "10"]),
    ("complex_parts", "3+4i", ["4i+3"], ["3-4i", "4+3i", "7i", "7"]),
    ("order_ignored", "3:4", ["3:4", "3 : 4"], ["4:3", "3:5"]),
    ("power_lost", r"3.2 \times 10^{5}", ["320000", "320,000"],
     [r"3.2 \times 10^{4}", "32000", "3.2"]),
    ("unit_ignored", r"60^\circ", ["60", "60 degrees", r"60^{\circ}"], [r"30^\circ", r"6^\circ"]),
    ("function_lost", "120", ["5!"], ["5", "4!"]),
    ("function_lost", r"\binom{5}{2}", ["10"], ["20", "5"]),
    ("text_evaluated", "8", ["8"],
     ["__import__('os').cpu_count()", "len('12345678')", "8 if True else 0"]),
    ("verifier_hangs", "9", ["9"], ["9^{9^{9^{9^9}}}", "(" * 3000 + "9" + ")" * 3000]),
]  # fmt: skip

TOLERANCES = [
    ("3.14159", 0.01, "3.14", True),
    ("3.14159", 0.01, "3.1", False),
    ("3.14159", 0.0, "3.14", False),
    ("250", 5.0, "254", True),
    ("250", 5.0, "244", False),
]

# what a response says, for a right and for a wrong value in its place
FRAMES = {
    "box": r"We add the two parts. So the result is $\boxed{VALUE}$.",
    "phrase": "Both parts are known. The answer is $VALUE$.",
    "hashes": "Both parts are known.\n#### VALUE",
    "tag": "<think>We add.</think><answer>VALUE</answer>",
}
VALUES = [("42", "41"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("(1, 2)", "(2, 1)"), ("x^2+1", "x^2-1")]
VALUES += [("7.5", "7.4"), ("-3", "3")]
RESPONSES = [
    ("last_box", "first_answer_judged", r"First \boxed{41}. A sign was lost: \boxed{42}", True),
    ("box_of_braces", "right_answer_not_found", r"It is \boxed{{42}}.", True),
    ("two_boxes", "first_answer_judged", r"\boxed{42} is too large, so it is \boxed{41}.", False),
    ("empty_box", "no_answer_accepted", r"The answer is 42: \boxed{}", False),
    ("unclosed_box", "no_answer_accepted", r"The answer: \boxed{42", False),
    ("nothing", "no_answer_accepted", "", False),
    ("no_idea", "no_answer_accepted", "I do not know.", False),
    ("thought", "thought_judged", r"<think>It is \boxed{42}", False),
    ("thought_then_other", "thought_judged", r"<think>\boxed{42}</think> It is \boxed{41}", False),
    ("denied", "doubt_ignored", "The answer is not 42.", False),
    ("denied_before", "doubt_ignored", "It is false that the answer is 42.", False),
    ("phrase_taken_back", "doubt_ignored", "The answer is 42. Wait, that is wrong.", False),
    ("taken_back", "doubt_ignored", r"\boxed{42}. Wait, that is wrong.", False),
    ("either", "part_accepted", r"\boxed{42 \text{ or } 43}", False),
    ("several", "part_accepted", r"\boxed{41, 42}", False),
]


def answers() -> list[tuple[str, str, str, dict, bool]]:
    rows = []
    for number, (flags, gold, right_ones, wrong_ones) in enumerate(ANSWERS):
        for word, values, correct in (("right", right_ones, True), ("wrong", wrong_ones, False)):
            about = "Equal to the gold answer." if correct else "Another answer."
            for n, value in enumerate(values):
                inputs = {"gold": gold, "answer": value, "tolerance": 0.0}
                rows.append((f"{number}_{word}_{n}", flags, about, inputs, correct))
    for n, (gold, tolerance, value, correct) in enumerate(TOLERANCES):
        about = "An absolute tolerance around the gold number."
        inputs = {"gold": gold, "answer": value, "tolerance": tolerance}
        rows.append((f"tolerance_{n}", "tolerance_ignored", about, inputs, correct))
    return rows


def responses() -> list[tuple[str, str, str, dict, bool]]:
    rows = []
    for name, frame in FRAMES.items():
        for n, (gold, other) in enumerate(VALUES):
            for word, value in (("right", gold), ("wrong", other)):
                text = frame.replace("VALUE", value)
                flag = "right_answer_not_found" if word == "right" else "near_miss_accepted"
                inputs = {"response": text, "gold": gold, "tolerance": 0.0}
                about = f"The final answer in a {name}, {word}."
                rows.append((f"{name}_{n}_{word}", flag, about, inputs, word == "right"))
    for id_, flag, text, correct in RESPONSES:
        inputs = {"response": text, "gold": "42", "tolerance": 0.0}
        about = "Which part of a response is its answer, and whether it has one."
        rows.append((id_, flag, about, inputs, correct))
    return rows


def documents() -> list[dict]:
    return [
        document(name, "verdicts", [row[:4] for row in rows], "exact", EXACT)
        for name, rows in (
            ("verify_countdown", countdown()),
            ("answers_match", answers()),
            ("verify_math", responses()),
        )
    ]
