"""The golden vectors for ports: they agree with the code and with oracles that nobody here wrote,
and the runner tells right from wrong."""

import ast
import json
import operator
import re
import sys
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from golden import check, flags, make, model_cases, mutants, pcg64, reference, verdict_cases
from golden.vectors import FOLDER, bundle, differences, dump, load_documents, resolve

STORED = {document["function"]: document for document in load_documents()}
# what a library does, and faults that are more than a changed piece of text
WITHOUT_MUTANT = {"merges_order", "other_operator", "text_evaluated", "verifier_hangs"}
SLOW = ("model", "iteration", "verdicts", "text")


def test_code_and_vectors_agree():
    """Fault: a product function, or a case, was changed and the vectors were not made again."""
    bundles = model_cases.bundles()
    for document in make.documents():
        stored = STORED[document["function"]]
        file = FOLDER / f"{document['function']}.json"
        assert file.read_text("utf-8") == dump(stored)
        made = make.complete(document, bundles)
        assert made | {"cases": []} == stored | {"cases": []}
        for now, then in zip(made["cases"], stored["cases"], strict=True):
            assert now | {"expected": 0} == then | {"expected": 0}
            got, expected = resolve(now["expected"], bundles), resolve(then["expected"])
            assert not list(differences(expected, got, stored["tolerance"])), now["id"]
    for name, tensors in bundles.items():
        assert tensors.keys() == bundle(name).keys()
        assert all(np.allclose(t, bundle(name)[key], 1e-4, 1e-5) for key, t in tensors.items())


def test_every_file_is_made():
    """Fault: the vectors of a function that is gone stay behind, and ports are held to them; a flag
    has no case or no meaning."""
    assert {document["function"] for document in make.documents()} == STORED.keys()
    assert reference.FUNCTIONS.keys() == STORED.keys()
    used = {flag for document in STORED.values() for flag in document["flags"]}
    assert used == flags.FLAGS.keys()


def test_float32_passes(monkeypatch):
    """Fault: a tolerance that no port in float32 can meet."""
    monkeypatch.setattr(reference, "DTYPE", torch.float32)
    assert not mutants.failing([d for d in STORED.values() if d["stage"] != "verdicts"])


# ---- mutants


@pytest.mark.filterwarnings("ignore:std")
def test_mutants_are_caught(monkeypatch):
    """Fault: a flag whose cases do not catch its fault; a mutant of code that has changed. The slow
    ones are only applied here: python -m golden.mutants runs all."""
    monkeypatch.setattr(reference, "DTYPE", torch.float32)
    all_mutants = mutants.load_mutants()
    fast = {f for d in STORED.values() if d["stage"] not in SLOW for f in d["flags"]}
    fast -= {f for d in STORED.values() if d["stage"] in SLOW for f in d["flags"]}
    for mutant in all_mutants:
        with mutants.applied(mutant):
            if mutant.flag in fast:
                documents = [d for d in STORED.values() if mutant.flag in d["flags"]]
                failed = mutants.failing(documents)
                assert any(mutant.flag in case["flags"] for case in failed), mutant
    assert not mutants.failing([STORED["grpo_loss"], STORED["select_experts"]])
    assert flags.FLAGS.keys() - {mutant.flag for mutant in all_mutants} == WITHOUT_MUTANT


# ---- oracles


@pytest.mark.parametrize("name", model_cases.FLAG_OF_MODEL)
def test_bundles_agree_with_transformers(name, tmp_path):
    """Fault: logits, loss, gradients or trained weights that are this project's alone."""
    import transformers

    config = model_cases.MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": name}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    cases = {d: next(c for c in STORED[d]["cases"] if c["id"] == name) for d in MODEL_FILES}
    weights = resolve(cases["model_forward"]["inputs"]["weights"])
    tensors = {key: torch.tensor(w, dtype=torch.float64) for key, w in weights.items()}
    model = model.double()
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    logits = model(torch.tensor(cases["model_forward"]["inputs"]["ids"])).logits
    expect(cases["model_forward"], logits.tolist())

    training, logps = cases["model_training"], []
    moments = {key: [torch.zeros_like(w), torch.zeros_like(w)] for key, w in tensors.items()}
    output = {"losses": [], "grad_norms": []}
    for step in range(1, 11):
        model.zero_grad()
        losses, logps = [], []
        for example in training["inputs"]["examples"]:
            prompt, ids = example["prompt_ids"], torch.tensor(example["ids"])
            logp = model(torch.tensor([prompt + example["ids"]])).logits[0].log_softmax(-1)
            logp = logp[len(prompt) - 1 : -1].gather(-1, ids[:, None])[:, 0]
            logps.append(logp.tolist())
            losses.append(-logp.sum())
        loss = sum(losses) / sum(len(row) for row in logps)
        loss.backward()
        named = dict(model.named_parameters())
        assert named.keys() == weights.keys()
        if step == 1:
            gradients = {key: w.grad.tolist() for key, w in named.items()}
            first = {"logps": logps, "loss": loss.item(), "gradients": gradients}
            expect(cases["model_gradients"], first)
        output["losses"].append(loss.item())
        output["grad_norms"].append(adamw_by_hand(named, moments, step, training["inputs"]))
        output[f"after_{step}"] = {key: w.tolist() for key, w in named.items()}
    expect(training, output)


MODEL_FILES = ("model_forward", "model_gradients", "model_training")


def expect(case: dict, output) -> None:
    tolerance = {"rel": 2e-5, "abs": 2e-6}  # closer than a port must come
    assert not list(differences(resolve(case["expected"]), output, tolerance))


@torch.no_grad()
def adamw_by_hand(named: dict, moments: dict, t: int, options: dict) -> float:
    """The formulas of golden/README.md."""
    norm = sum(float((w.grad**2).sum()) for w in named.values()) ** 0.5
    for key, w in named.items():
        m, v = moments[key]
        g = w.grad * min(1.0, options["grad_clip"] / (norm + 1e-6))
        w.sub_(options["lr"] * options["weight_decay"] * w)
        m.copy_(0.9 * m + 0.1 * g)
        v.copy_(0.999 * v + 0.001 * g**2)
        w.sub_(options["lr"] * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    return norm


def test_streams_are_the_samplers(monkeypatch):
    """Fault: the uniform numbers of a case are not those that the sampler draws with."""
    drawn, draw = [], reference.sampler.draw
    monkeypatch.setattr(
        reference.sampler, "draw", lambda logp, u: drawn.extend(u.tolist()) or draw(logp, u)
    )
    case = STORED["sample"]["cases"][0]
    reference.answer({"function": "sample", "inputs": resolve(case["inputs"])})
    given = {
        np.float32(u).item() for group in case["inputs"]["uniforms"] for us in group for u in us
    }
    assert drawn and set(drawn) <= given


@pytest.mark.parametrize(
    "path", [(0,), (7, 0, 3, 1), (2**32 - 1, 2**32, 5), (2**63 + 5, 1, 0), (1, 2, 3, 4, 5, 6, 7)]
)
def test_generator_is_numpys(path):
    """Fault: the definition that ports follow is not what numpy computes."""
    expected = np.random.SeedSequence(path).generate_state(3, np.uint64).tolist()
    assert pcg64.seed_words(path, 3) == expected
    given, ours = np.random.default_rng(path), pcg64.PCG64(path)
    assert [ours.random() for _ in range(9)] == given.random(9).tolist()
    for n in (1, 2, 3, 100, 1000):
        expected = np.random.default_rng(path).permutation(n).tolist()
        assert pcg64.PCG64(path).permutation(n) == expected


def test_verdicts_are_those_that_the_cases_were_made_for():
    """Fault: a vector that fixes a mistake of the verifier as the right answer."""
    made = {
        "verify_countdown": verdict_cases.countdown(),
        "answers_match": verdict_cases.answers(),
        "verify_math": verdict_cases.responses(),
    }
    for name, rows in made.items():
        stored = {case["id"]: case["expected"]["correct"] for case in STORED[name]["cases"]}
        assert stored == {row[0]: row[4] for row in rows} and len(stored) == len(rows)
    assert len(STORED["verify_countdown"]["cases"]) >= 300
    assert len(STORED["answers_match"]["cases"]) + len(STORED["verify_math"]["cases"]) >= 300


@cache
def reachable(numbers: tuple) -> frozenset:
    """Every value that + - * / make of all of the numbers."""
    if len(numbers) == 1:
        return frozenset([Fraction(numbers[0])])
    values = set()
    for bits in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if bits >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not bits >> i & 1)
        for a in reachable(left):
            for b in reachable(right):
                values |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return frozenset(values)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub}
OPERATORS |= {ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(text: str, numbers: list) -> Fraction:
    """The exact value of a formula; its numbers are added to the list."""

    def value(node) -> Fraction:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            numbers.append(-node.operand.value)
            return Fraction(-node.operand.value)
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(text.strip(), mode="eval").body)


def is_right(response: str, numbers: list, target: int) -> bool:
    """An oracle for the forms that these cases have."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return False
    text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    if "boxed{" in text:
        text, closed, _ = text.rpartition("boxed{")[2].partition("}")
        if not closed:
            return False
    for sign, plain in ((r"\times", "*"), (r"\div", "/"), ("×", "*"), ("÷", "/")):
        text = text.replace(sign, plain)
    board = [Fraction(n) for n in numbers]
    try:
        for step in filter(str.strip, re.split("[,;\n]", text)):
            sides = [(used := [], value_of(side, used)) for side in step.split("=")]
            is_number = len(sides) == 2 and len(sides[0][0]) == 1
            if is_number and sides[0][1] not in board:  # 16 = 8 * 2
                sides.reverse()
            if len({value for _, value in sides}) > 1:
                return False
            for number in sides[0][0]:
                board.remove(number)
            board.append(sides[0][1])
    except (SyntaxError, KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError):
        return False
    return board == [target]


def test_countdown_agrees_with_brute_force():
    """Fault: a verdict on a derivation that another reader of it does not share, or that counts as
    right although the numbers cannot make the target."""
    for case in STORED["verify_countdown"]["cases"]:
        inputs, right = case["inputs"], case["expected"]["correct"]
        if len(inputs["response"]) < 1000:
            assert is_right(**inputs) == right, case["id"]
        assert not right or inputs["target"] in reachable(tuple(inputs["numbers"]))


# gold and answer on which math-verify decides otherwise: its known limits, each of them
MATH_VERIFY_DIFFERS = {
    *[("42", "42."), ("x^2+2x+1", "X^2+2X+1"), ("(1, 2)", r"\{1, 2\}"), ("25", "25%")],
    *[(r"\{1, 2, 3\}", "(1,2,3)"), (r"(-\infty, 3]", r"x \le 3"), (r"(-\infty, 3]", r"x \leq 3")],
    *[(r"12 \text{ cm}", "12 km"), (r"12 \text{ cm}", "12 kg")],
    *[(r"\$18", "18"), (r"\$18", "18 dollars"), (r"\$18", r"\$18.00")],
}


def test_mathematics_agrees_with_math_verify():
    """Fault: a verdict on two answers that the usual verifier does not share, unknown to us."""
    from math_verify import parse, verify

    def boxed(text: str) -> list:
        return parse(rf"\boxed{{{text.replace('$', '')}}}")

    differing, count = set(), 0
    for case in STORED["answers_match"]["cases"]:
        gold, answer, tolerance = case["inputs"].values()
        if tolerance or case["flags"][0] in ("verifier_hangs", "text_evaluated"):
            continue
        count += 1
        if verify(boxed(gold), boxed(answer)) != case["expected"]["correct"]:
            differing.add((gold, answer))
    assert count > 270 and differing == MATH_VERIFY_DIFFERS


# ---- the runner

PORT = """
import json, sys, time
for line in sys.stdin:
    what = json.loads(line)["inputs"]["what"]
    if what == "ends":
        sys.exit(3)
    if what == "hangs":
        time.sleep(600)
    print(what if what[0] in "{h" else json.dumps({"output": json.loads(what)}), flush=True)
"""
ANSWERS = {  # what the port answers: what becomes of the case, and why
    "1.5": ("passed", ""),
    "1.5000001": ("passed", ""),
    "ends": ("failed", "ended without an answer, exit status 3"),
    "1.50": ("passed", ""),  # after the port was started again
    "1.6": ("failed", "the answer: expected 1.5, got 1.6"),
    '"nan"': ("failed", 'the answer: expected 1.5, got "nan"'),
    "NaN": ("failed", "the answer: expected 1.5, got NaN"),
    "true": ("failed", "the answer: expected 1.5, got true"),
    "[1.5]": ("failed", "the answer: expected 1.5, got [1.5]"),
    "hello": ("failed", "not JSON: 'hello'"),
    "1.500": ("passed", ""),
    "hangs": ("failed", "no answer within 0.5 s"),
    "1.5000": ("passed", ""),
    '{"skip": "no GPU"}': ("skipped", "no GPU"),
    '{"error": "no idea"}': ("failed", "error: no idea"),
    '{"result": 1.5}': ("failed", 'expected {"output": ...} or {"skip": ...}, got {"result": 1.5}'),
}


def document(**changes) -> dict:
    cases = [{"id": w, "flags": ["a"], "inputs": {"what": w}, "expected": 1.5} for w in ANSWERS]
    head = {"function": "f", "stage": "losses", "tolerance": {"rel": 1e-6, "abs": 0.0}}
    return head | {"flags": {"a": "a hint"}, "cases": cases} | changes


@pytest.fixture
def port(tmp_path) -> check.Port:
    (tmp_path / "port.py").write_text(PORT)
    port = check.Port([sys.executable, str(tmp_path / "port.py")], deadline_s=0.5)
    yield port
    port.stop()


def test_runner_survives_everything(port):
    """Fault: a port that ends, hangs, or writes something else ends the run, spoils the cases
    behind it, or passes."""
    results = list(check.run(port, [document()], [], []))
    assert {r.path.rpartition("/")[2]: (r.outcome, r.detail) for r in results} == ANSWERS
    table = check.table(results)
    assert "losses              5       10        1" in table and table.count("a: a hint") == 5
    assert "skipped: f (1): no GPU" in table


def test_runner_gives_up_on_a_port_that_does_not_read(monkeypatch):
    """Fault: a request that is larger than the pipe waits for ever."""
    monkeypatch.setattr(check, "START_S", 0.5)
    port = check.Port([sys.executable, "-c", "import time; time.sleep(600)"], deadline_s=0.5)
    with pytest.raises(check.Failed, match="no answer within"):
        port.ask({"filling": "x" * 10**6})
    assert port.process.poll() is not None


def test_runner_gives_up_on_a_port_that_never_answers():
    """Fault: a port that cannot start is started for every case, and takes hours."""
    port = check.Port([sys.executable, "-c", "pass"], deadline_s=0.5)
    outcomes = [r.detail for r in check.run(port, [document()], [], [])]
    assert outcomes[4:6] == [
        "ended without an answer, exit status 0",
        "not asked: 5 cases in a row had no answer",
    ]


def test_runner_chooses_cases(port):
    """Fault: -only and -skip choose other cases than they say."""
    documents = [document(), document(function="g", stage="filter")]

    def chosen(only: list[str], skip: list[str]) -> list[str]:
        return [r.path for r in check.run(port, documents, only, skip)]

    assert chosen(["losses/f/1.6", "filter/g/1.5"], []) == ["losses/f/1.6", "filter/g/1.5"]
    assert chosen(["*/*/1.5"], ["filter"]) == ["losses/f/1.5"]
    assert chosen(["losses"], ["losses/f"]) == []


def test_runner_exit_status(port, monkeypatch, capsys):
    """Fault: a failure, or a command that cannot be started, that continuous integration misses."""
    monkeypatch.setattr(check, "load_documents", lambda: [document()])
    assert check.main(["-only", "*/*/1.5", *port.command]) == 0
    assert check.main(["-only", "*/*/1.6", *port.command]) == 1
    assert check.main(["-only", "nothing", *port.command]) == 1
    assert check.main(["no such command"]) == 1
    assert "no such command" in capsys.readouterr().err


def test_the_first_difference_is_the_cause():
    """Fault: a wrong backward pass is reported as a wrong embedding, which every fault reaches; a
    wrong advantage as a wrong loss."""
    case = STORED["model_gradients"]["cases"][0]
    names = list(resolve(case["expected"])["gradients"])
    assert names[:3] == [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    assert names[-2:] == ["model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]
    assert len(names) == 21
    for case in STORED["iteration"]["cases"]:
        assert all([*step][2:] == ["advantages", "updates"] for step in case["expected"]["steps"])


@pytest.mark.parametrize(
    "expected, got, lines",
    [
        ({"a": 1, "b": 2}, {"a": 1}, ["the answer: has no 'b'"]),
        ({"a": [1, 2]}, {"a": [1, 3], "c": 0}, ["a[1]: expected 2, got 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: expected 1 items, got 2 items"]),
        ([1], "1", ['the answer: expected 1 items, got "1"']),
        (1, 1.0, []),
        (1, True, ["the answer: expected 1, got true"]),
        (True, 1, ["the answer: expected true, got 1"]),
        ("1", 1, ['the answer: expected "1", got 1']),
        ("nan", "nan", []),
        ("-inf", "inf", ['the answer: expected "-inf", got "inf"']),
        ("-inf", -1e38, ['the answer: expected "-inf", got -1e+38']),
        (0.0, -0.0, []),
        (2.0, 2.01, []),
        (2.0, 2.04, ["the answer: expected 2.0, got 2.04"]),
        (None, None, []),
    ],
)
def test_differences(expected, got, lines):
    """Fault: the comparison overlooks a difference, or sees one where there is none."""
    assert list(differences(expected, got, {"rel": 0.01, "abs": 0.0})) == lines
