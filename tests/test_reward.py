"""data.reward: a function of one's own, from the page that documents it to the trained policy."""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from conftest import ROOT, SMALL_RUN, TINY

import report
import rloop
from answers import workers
from config import UserError, load_config
from data import Problem, load_problems
from rloop import select_experts
from tests.test_rloop import trajectory
from verify import check_reward, verify, verify_many

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
CODE, RECORDS, COMMAND = re.findall(
    r"^```\n(.*?)^```$", PAGE.partition("## A reward of your own")[2], re.DOTALL | re.MULTILINE
)
COUNTDOWN = str(ROOT / "configs" / "countdown.toml")

FUNCTIONS = """
import json, os, subprocess, sys, time

value = 1.0

def length(problem, response):
    return min(1.0, len(response) / 20)

def terms(problem, response):
    return min(0.75, sum(number in response.split() for number in ("2", "3", "5", "7", "8")) / 4)

def numbers(problem, response):
    return problem.numbers[0] / 100 + problem.target / 10_000

def seen(problem, response):
    wanted = {"id": "7", "schema": {"type": "array"}, "problem": "A list?", "answer": None}
    found = (problem.fields, problem.id, problem.prompt, problem.answer, response)
    return found == (wanted, "7", "A list?", "", "x")

def gold(problem, response):
    from verify import verify_math
    return verify_math(response, problem.answer).correct and len(response) < 20

def echo(problem, response):
    print("[1.0, null]")
    return json.loads(response)

def starts_a_program(problem, response):
    return bool(subprocess.run(["sh", "-c", "echo started; echo '[1.0, null]'"]).returncode)


def missing_key(problem, response):
    return problem.fields["schema"]

def writes(problem, response):
    problem.fields["schema"] = 1

def leaves(problem, response):
    sys.exit(1)

def sleeps(problem, response):
    time.sleep(60)

def takes_memory(problem, response):
    return len(bytearray(3 * 1024**3)) > 0

def dies(problem, response):
    os._exit(1)

def fails_on_text(problem, response):
    return 1 / len(response) if not response else [][len(response)]
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with my_rewards.py, and worker processes that start there."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS, encoding="utf-8")
    workers._stop_workers()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    workers._stop_workers()


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def problem(function: str, **fields) -> Problem:
    kind = f"my_rewards:{function}"
    return Problem(id="p:3", prompt="?", answer="", kind=kind, fields=fields)


# ---- the page


def test_documented_example_judges_as_it_says(place):
    """Fault: the function on the page is wrong, or its records cannot be loaded without a gold
    answer."""
    (place / "my_rewards.py").write_text(CODE)
    (place / "people.jsonl").write_text(RECORDS)
    ann, bob = load_problems("people.jsonl", reward="my_rewards:valid_json")
    assert bob.fields == {"problem": "Bob is 47. Answer in JSON.", "keys": ["name", "age"]}
    good = ['{"name": "Ann", "age": 31}', '{"age": null, "name": 0, "more": []}']
    bad = ["", "Ann", "[]", '["name", "age"]', '{"name": "Ann"}', "{" * 100_000, "[" * 100_000]
    verdicts = verify_many([ann] * 9, good + bad)
    assert [v.reward for v in verdicts] == [1.0] * 2 + [0.0] * 7
    assert [v.reason for v in verdicts] == ["correct"] * 2 + ["wrong"] * 7


def test_documented_command_runs(place):
    """Fault: the command on the page does not run, the function is not found in the working
    directory, its rewards do not reach the trajectories, or its file is not in the hashes."""
    records = RECORDS.splitlines(keepends=True)
    (place / "my_rewards.py").write_text(CODE)
    (place / "people.jsonl").write_text(records[0])
    (place / "people_test.jsonl").write_text(records[1])
    words = ["<eos>", '{"name":"Ann","age":31}', "[]"]
    words += dict.fromkeys(" ".join(json.loads(r)["problem"] for r in records).split())
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (place / "model").mkdir()
    tokenizer.save("model/tokenizer.json")
    Path("model/tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    Path("model/config.json").write_text(
        json.dumps(TINY | {"vocab_size": len(words), "initializer_range": 0.02})
    )
    script, config, *overrides = shlex.split(COMMAND.replace("\\\n", " "))[1:]
    path = overrides.pop(0)
    tiny = "--model.path model --model.random_init true --data.chat_template false --compute.dtype"
    small = [*SMALL_RUN, *tiny.split(), "float32", "--sampling.max_new_tokens", "1"]
    small += ["--data.train_size", "0", "--data.eval_size", "0", "--run_dir", "run"]
    arguments = [ROOT / script, config, ROOT / path, *small, *overrides]
    subprocess.run([sys.executable, *map(str, arguments)], check=True, timeout=300)
    rows = read(place / "run/trajectories/iteration_1.jsonl")
    rewards = {row["response"]: row["reward"] for row in rows}
    assert 1.0 in rewards.values() and 0.0 in rewards.values()
    for response, reward in rewards.items():
        assert reward == float(response == words[1])
    stored = json.loads(Path("run/config.json").read_text())
    assert stored["data"]["reward"] == "my_rewards:valid_json"
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    assert stored["sha256"]["my_rewards.py"] == digest


# ---- the call


def test_function_sees_the_record(place):
    """Fault: a field of the record, the id or the response does not reach the function, or a
    record without a gold answer is refused."""
    record = {"id": "7", "schema": {"type": "array"}, "problem": "A list?", "answer": None}
    (place / "p.jsonl").write_text(json.dumps(record) + "\n")
    (one,) = load_problems("p.jsonl", reward="my_rewards:seen")
    assert verify(one, "x").correct and not verify(one, "y").correct
    with pytest.raises(UserError, match="p.jsonl:1: has no 'answer'"):
        load_problems("p.jsonl")


def test_function_of_the_gold_answer(place):
    """Fault: a record's gold answer is not read as without data.reward (GSM8K's ####), or the
    project's own judge cannot be called in a worker."""
    (place / "p.jsonl").write_text('{"question": "6*7?", "answer": "so\\n#### 42"}\n')
    (one,) = load_problems("p.jsonl", reward="my_rewards:gold")
    verdicts = verify_many([one] * 3, [r"\boxed{42}", r"\boxed{41}", "x" * 30 + r" \boxed{42}"])
    assert [v.correct for v in verdicts] == [True, False, False]


@pytest.mark.parametrize("answer", [{"a": 1}, [["x"]], "?", float("inf"), "\\frac{1}{", [1, {}]])
def test_any_answer_is_allowed(place, answer):
    """Fault: a record is refused for a gold answer that the function does not need."""
    (place / "p.jsonl").write_text(json.dumps({"problem": "A?", "answer": answer}) + "\n")
    (one,) = load_problems("p.jsonl", reward="my_rewards:length")
    assert one.fields["answer"] == answer
    assert verify(one, "x" * 10).reward == 0.5


def test_question_is_still_required(place):
    """Fault: with data.reward a record without a question is trained on."""
    (place / "p.jsonl").write_text('{"answer": "1"}\n')
    with pytest.raises(UserError, match="p.jsonl:1: has no 'problem'"):
        load_problems("p.jsonl", reward="my_rewards:length")


def test_repeated_questions_are_left_out(place, capsys):
    """Fault: with data.reward a question counts twice, or its copies, which no gold answer tells
    apart, are compared as mathematics and left out."""
    (place / "p.jsonl").write_text('{"problem": "A?", "n": 1}\n{"problem": "A?", "answer": "2"}\n')
    (one,) = load_problems("p.jsonl", reward="my_rewards:length")
    assert one.fields["n"] == 1
    assert "2 records, of which 1 are different" in capsys.readouterr().out


def test_dates_and_bytes_cross_as_text(place):
    """Fault: a parquet column that JSON does not have ends the run with a traceback."""
    import datetime

    day = datetime.date(2026, 1, 2)
    assert verify(problem("length", day=day, image=b"\xff"), "x" * 10).reward == 0.5


def test_reward_on_generated_games(place):
    """Fault: data.reward is ignored for a generated source, or a game does not reach it."""
    record = {"nums": [3, 5, 2], "target": 16, "level": "easy"}
    (place / "games.json").write_text(json.dumps(record))
    games = load_problems("countdown:train", size=3, seed=1, reward="my_rewards:numbers")
    games += load_problems("games.json", reward="my_rewards:numbers")
    for game in games:
        expected = game.numbers[0] / 100 + game.target / 10_000
        assert verify(game, "x").reward == expected
    assert games[-1].fields == record and games[-1].numbers == (3, 5, 2)


@pytest.mark.parametrize(
    ("text", "reward", "reason"),
    [
        ("true", 1.0, "correct"),
        ("1", 1.0, "correct"),
        ("false", 0.0, "wrong"),
        ("0.0", 0.0, "wrong"),
        ("0.25", 0.25, "partial"),
        ("0.9999999999999999", 0.9999999999999999, "partial"),
    ],
)
def test_values(place, text, reward, reason):
    """Fault: a share is rounded, is called correct, or what a function prints is its answer."""
    verdict = verify(problem("echo"), text)
    assert (verdict.reward, verdict.reason, verdict.correct) == (reward, reason, reward == 1)


def test_no_program_forges_a_reward(place):
    """Fault: what a program prints that the function runs (a policy's code) is the reward."""
    for _ in range(2):
        assert verify(problem("starts_a_program"), "x").reason == "wrong"


@pytest.mark.parametrize(
    ("function", "response", "message"),
    [
        ("missing_key", "x", "KeyError: 'schema'"),
        ("echo", "{", "JSONDecodeError: Expecting property name"),
        ("echo", "1.5", "returned 1.5; expected a bool or a number from 0 to 1"),
        ("echo", "-1", "returned -1; expected"),
        ("echo", "NaN", "returned nan; expected"),
        ("echo", "null", "returned None; expected"),
        ("echo", '"1"', "returned '1'; expected"),
        ("echo", "[1]", "returned [1]; expected"),
        ("writes", "x", "TypeError: 'mappingproxy' object does not support item assignment"),
        ("leaves", "x", "SystemExit: 1"),
        ("value", "x", "TypeError: 'float' object is not callable"),
        ("no_function", "x", "AttributeError: module 'my_rewards' has no attribute 'no_function'"),
    ],
)
def test_fault_of_the_function_is_an_error(place, function, response, message):
    """Fault: a function that fails gives reward 0 to everything, silently, or the error does not
    say which function, problem and response."""
    place_ = f"reward my_rewards:{function}, problem 'p:3', response {response!r}: "
    with pytest.raises(UserError, match=re.escape(place_ + message)):
        verify_many([problem(function)] * 2, [response] * 2)
    assert verify(problem("length"), "x" * 20).correct  # the workers still work


@pytest.mark.parametrize("function", ["sleeps", "takes_memory", "dies"])
def test_beyond_the_limits_is_no_reward(place, function):
    """Fault: a call that takes all time or memory holds up or ends the run, or is rewarded."""
    verdicts = verify_many([problem(function), problem("length")], ["x" * 20] * 2, timeout_s=2.0)
    assert [(v.reward, v.reason) for v in verdicts] == [(0.0, "timeout"), (1.0, "correct")]


def test_order_of_many_calls(place):
    """Fault: rewards go to other responses than their own when many workers answer."""
    responses = ["x" * (i % 21) for i in range(300)]
    verdicts = verify_many([problem("length")] * 300, responses, num_workers=4)
    assert [v.reward for v in verdicts] == [len(r) / 20 for r in responses]


def test_working_directory_shadows_no_module(place):
    """Fault: a file of the working directory stands for a module of Python or of this project."""
    for name in ("json", "verify", "data", "numpy"):
        (place / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    assert verify(problem("echo"), "0.5").reward == 0.5


# ---- the start of a run


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("no_module:f", "reward no_module:f.*No module named 'no_module'"),
        ("broken:f", "reward broken:f.*SyntaxError.*broken.py, line 1"),
        ("my_rewards:no_function", "has no attribute 'no_function'"),
        ("my_rewards:value", "'float' object is not callable"),
        ("my_rewards:fails_on_text", "ZeroDivisionError"),
        ("my_rewards:dies", "reward my_rewards:dies: an empty response is not judged within"),
        ("my_rewards", "data.reward = 'my_rewards': expected module:function"),
    ],
)
def test_bad_reward_stops_the_run_before_it_samples(place, reward, message, monkeypatch):
    """Fault: a mistyped or broken reward shows itself only after the model has sampled."""
    (place / "broken.py").write_text("def f(:\n")
    monkeypatch.setattr(rloop, "evaluate", lambda *_: pytest.fail("it has sampled"))
    monkeypatch.chdir(place)
    model = ["--model.path", str(ROOT / "data" / "countdown_base"), "--run_dir", "run"]
    with pytest.raises(UserError, match=message):
        rloop.run_method(load_config(COUNTDOWN, [*SMALL_RUN, *model, "--data.reward", reward]))


def test_every_judge_passes_the_check(place):
    """Fault: the check at the start refuses Countdown, mathematics or a reasoning-gym task."""
    (place / "p.jsonl").write_text('{"question": "6*7?", "answer": "42"}\n')
    for source in ("p.jsonl", "countdown:train", "reasoning_gym:chain_sum"):
        check_reward(load_problems(source, size=1))
    check_reward([])


# ---- rewards between 0 and 1


def test_experts_have_the_least_reward():
    """Fault: partial rewards are no experts at any threshold, or they count at the default one."""
    phase = [trajectory("p", ids=[n], reward=n / 4) for n in range(5)]
    limits = {"max_success_rate": 1.0, "max_per_problem": 9}
    assert [t.reward for t in select_experts(phase, **limits)] == [1.0]
    assert [t.reward for t in select_experts(phase, **limits, min_reward=0.5)] == [0.5, 0.75, 1.0]
    assert not select_experts(phase, max_success_rate=0.5, max_per_problem=9, min_reward=0.5)


def test_run_with_partial_rewards(place):
    """Fault: somewhere between worker and expert a reward is rounded to 0 or 1, or the counters of
    the filter and of the evaluation use another threshold than the selection."""
    overrides = "--data.reward my_rewards:terms --select.min_reward 0.5 --iterations 1"
    model = ["--model.path", str(ROOT / "data" / "countdown_base"), "--run_dir", "run"]
    cfg = load_config(COUNTDOWN, [*SMALL_RUN, *overrides.split(), *model])
    rloop.run_method(cfg)

    run = place / "run"
    rows, records = read(run / "trajectories/iteration_1.jsonl"), read(run / "metrics.jsonl")
    for row in rows:
        numbers = sum(number in row["response"].split() for number in ("2", "3", "5", "7", "8"))
        assert row["reward"] == min(0.75, numbers / 4)
    assert {row["reward"] for row in rows} == {0.0, 0.25, 0.5, 0.75}
    steps = [record for record in records if record["phase"] == "rl"]
    for record in steps:
        rewards = [row["reward"] for row in rows if row["step"] == record["step"]]
        assert record["rl/reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert any(record["rl/grad_norm"] > 0 for record in steps)
    (counts,) = [record for record in records if record["phase"] == "filter"]
    assert 0 < counts["filter/num_correct"] < len(rows)
    assert counts["filter/num_correct"] == sum(row["reward"] >= 0.5 for row in rows)
    experts = read(run / "experts/iteration_1.jsonl")
    assert min(row["reward"] for row in experts) == 0.5
    evaluation = next(record for record in records if record["phase"] == "eval")
    solved = sum(read(run / "evaluations.jsonl")[0]["num_correct"].values())
    assert evaluation["eval/avg@4"] == pytest.approx(solved / (4 * 8))
    assert 0 < evaluation["eval/avg@4"] < 1


@pytest.mark.parametrize(("value", "rule"), [("0", "above 0"), ("1.01", "at most 1")])
def test_least_reward_has_limits(value, rule):
    """Fault: every response is an expert, or none can be."""
    with pytest.raises(UserError, match=f"select.min_reward = .*: must be {rule}"):
        load_config(COUNTDOWN, ["--select.min_reward", value])


def test_runs_of_other_rewards_do_not_compare():
    """Fault: one table sets the avg@k of two different judges side by side."""
    for key in ("data.reward", "select.min_reward", "data.eval", "eval.num_samples"):
        assert report.SHARED_KEY.fullmatch(key), key
    assert not report.SHARED_KEY.fullmatch("select.max_per_problem")


def test_changed_reward_is_another_run(place):
    """Fault: a run goes on with a reward that was edited since it began."""
    arguments = ["--data.reward", "my_rewards:length", "--method", "eval", "--run_dir", "run"]
    model = ["--model.path", str(ROOT / "data" / "countdown_base")]
    cfg = load_config(COUNTDOWN, [*SMALL_RUN, *arguments, *model])
    rloop.run_method(cfg)
    with (place / "my_rewards.py").open("a") as file:
        file.write("# edited\n")
    with pytest.raises(UserError, match="differing keys: sha256.my_rewards.py"):
        rloop.run_method(cfg)
