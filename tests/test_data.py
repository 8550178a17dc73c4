"""data/: games that can be solved and share nothing between splits, demonstrations with right
arithmetic, the public file formats, reasoning-gym, errors that name the place."""

import itertools
import json
import re
import time
from collections import Counter
from fractions import Fraction

import pyarrow.parquet
import pytest
import tokenizers
from conftest import ROOT
from tokenizers import models, pre_tokenizers

import rloop
from config import UserError, load_config
from data import (
    countdown,
    load_data,
    load_demonstrations,
    load_problems,
    next_problems,
)
from data.tokenizer import Tokenizer
from verify import verify, verify_many

BASE = ROOT / "data" / "countdown_base"
SPLITS = ("train", "heldout", "search", "demonstrations")


def reachable(numbers: tuple) -> set[Fraction]:
    """Every value that all the numbers together can make, by brute force."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = Fraction(numbers[i]), Fraction(numbers[j])
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for value in {a + b, a - b, a * b} | ({a / b} if b else set()):
            values |= reachable((*rest, value))
    return values


def test_games_are_solvable_and_need_search():
    """Fault: a game without a solution, or one that plain addition solves."""
    problems = load_problems("countdown:train", size=100, seed=3)
    for problem in problems + load_problems("countdown:heldout?numbers=4", size=20):
        assert problem.target in reachable(problem.numbers)
        assert problem.target != sum(problem.numbers) and 1 <= problem.target <= 99
        assert problem.prompt == countdown.question(problem.numbers, problem.target)


def test_countdown_options():
    """Fault: an option of a Countdown source is ignored, or the source without options is not the
    task of the README's results."""
    problems = load_problems("countdown:train?numbers=4&max=9", size=20)
    assert all(len(p.numbers) == 4 and max(p.numbers) <= 9 for p in problems)
    plain, stated = (
        load_problems(f"countdown:train{options}", size=20) for options in ("", "?max=20&numbers=3")
    )
    assert plain == stated
    ((question, _),) = load_demonstrations("countdown:skills?numbers=5", size=1)
    assert len(question.partition("from")[2].split()) == 5


def test_splits_share_no_numbers_for_any_seed():
    """Fault: a held-out game, or the same numbers with another target, is among the training games
    or demonstrations."""
    numbers = {
        split: {tuple(sorted(n)) for seed in range(3) for n, _ in
                countdown.generate_games(split, size=300, seed=seed, num_numbers=3, max_number=20)}
        for split in SPLITS
    }  # fmt: skip
    for stage in countdown.STAGES:
        demos = countdown.generate_demonstrations(
            stage, size=2000, seed=0, num_numbers=3, max_number=20
        )
        numbers["demonstrations"] |= {tuple(sorted(n)) for n, _, _ in demos}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not numbers[a] & numbers[b]


def test_games_are_unique_and_seeded():
    """Fault: the same game twice (with its numbers in another order), or games that change from run
    to run."""
    problems = load_problems("countdown:train", size=400, seed=1)
    assert (
        len({(tuple(sorted(p.numbers)), p.target) for p in problems})
        == len({p.id for p in problems})
        == 400
    )
    assert (
        problems
        == load_problems("countdown:train", size=400, seed=1)
        != load_problems("countdown:train", size=400, seed=2)
    )
    assert [p.id for p in load_problems("countdown:heldout", size=3)] == HELDOUT


HELDOUT = ["countdown:2,15,13->43", "countdown:7,11,15->88", "countdown:3,5,18->49"]


@pytest.mark.parametrize(
    ("stage", "wrong_targets", "in_order"), [("skills", 0.3, 1 / 3), ("habit", 1.0, 0.9 + 0.1 / 3)]
)
def test_demonstrations_have_right_arithmetic(stage, wrong_targets, in_order):
    """Fault: the base policy is taught wrong arithmetic, or the shares of wrong targets and of the
    habit are not those of STAGES."""
    demos = countdown.generate_demonstrations(
        stage, size=4000, seed=0, num_numbers=3, max_number=20
    )
    wrong, first_two = 0, 0
    for numbers, target, steps in demos:
        board = list(numbers)
        for step in steps.split(", "):
            a, operator, b, value = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step).groups()
            first_two += len(board) == 3 and sorted(board[:2]) == sorted((int(a), int(b)))
            board.remove(int(a)), board.remove(int(b))
            assert (
                {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
                == int(value)
                <= 99
            )
            board.append(int(value))
        assert len(board) == 1
        wrong += board[0] != target
    assert abs(wrong / 4000 - wrong_targets) < 0.05 and abs(first_two / 4000 - in_order) < 0.06


def build_tokenizer() -> tokenizers.Tokenizer:
    """One token for each number 0..countdown.MAX_VALUE, sign and word of the game."""
    words = ["<eos>", "make", "from", *":,=+-*/()", *map(str, range(countdown.MAX_VALUE + 1))]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return tokenizer


def test_tokenizer_file_is_what_the_code_builds(tmp_path):
    """Fault: tokenizer.json and its builder drift apart, or the model's vocabulary does not fit."""
    build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(
        (BASE / "tokenizer.json").read_text()
    )
    config = json.loads((BASE / "config.json").read_text())
    assert config["vocab_size"] == build_tokenizer().get_vocab_size()


def test_tokenizer_round_trip():
    """Fault: numbers split into digits, signs lost, or the stop token visible in the text."""
    tokenizer = Tokenizer(BASE)
    ids = tokenizer.encode("make 16 from 3 5 20:")
    assert len(ids) == 7 and tokenizer.stop_ids == {tokenizer.eos_id} == {0}
    assert (
        tokenizer.decode([*tokenizer.encode("3 + 5 = 8, 8 * (2 / 1) = 16"), 0])
        == "3 + 5 = 8 , 8 * ( 2 / 1 ) = 16"
    )


def test_text_outside_the_vocabulary_is_an_error():
    """Fault: unknown words vanish from the prompt in silence."""
    with pytest.raises(UserError, match="cannot tokenize 'make 100 from 3'"):
        Tokenizer(BASE).encode("make 100 from 3")


def test_eos_of_every_file_stops(tmp_path):
    """Fault: a checkpoint with two EOS ids (Qwen2.5) stops on one of them only."""
    (tmp_path / "tokenizer.json").write_text((BASE / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.stop_ids == {0, 5, 6, 7} and tokenizer.eos_id == 0


def test_checkpoint_without_eos_is_an_error(tmp_path):
    """Fault: no stop token, so every response is cut off and scores 0."""
    (tmp_path / "tokenizer.json").write_text((BASE / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="EOS"):
        Tokenizer(tmp_path)


def test_jsonl_problems(tmp_path):
    """Fault: numeric answers or the question alias are refused, or blank lines count."""
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"problem": "1+1?", "answer": "2", "id": "a"}\n\n{"question": "2+2?", "answer": 4}\n'
        '{"problem": "3+3?", "answer": "6", "unique_id": "t/1"}\n',
        encoding="utf-8",
    )
    problems = load_problems(str(file))
    assert [(p.id, p.prompt, p.answer, p.kind) for p in problems] == [
        ("a", "1+1?", "2", "math"),
        ("p.jsonl:3", "2+2?", "4", "math"),
        ("t/1", "3+3?", "6", "math"),
    ]
    assert len(load_problems(str(file), size=1, seed=5)) == 1
    with pytest.raises(UserError, match="4 items wanted, it holds 3"):
        load_problems(str(file), size=4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"problem": "y", "answer": "2", "id": "a"}',
            "p.jsonl:2: id 'a' belongs to an earlier, different question",
        ),
        ('{"problem": "x", "answer": "1"', "p.jsonl:2: not valid .jsonl"),
        ('["x"]', "p.jsonl:2: expected an object"),
        ('{"problem": "x"}', "p.jsonl:2: has no 'answer'"),
        ('{"problem": " ", "answer": "1"}', "p.jsonl:2: has no 'problem'"),
        ('{"problem": "x", "answer": null}', "p.jsonl:2: has no 'answer'"),
        ('{"problem": "x", "answer": "\\\\frac{1}{"}', "p.jsonl:2: gold answer"),
    ],
)
def test_broken_line_names_file_and_line(tmp_path, line, message):
    """Fault: a broken record is skipped, problems of one id merge, or the error does not say where
    it is."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "x", "answer": "1", "id": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        load_problems(str(file))


DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'What is $2+3$?\n\nRemember to put your answer on its own line after "Answer:".'
)
BOXES = r"First $\boxed{1}$ apple. Then \boxed{\frac{1}{2}}."
GSM8K = "He has 2 * 617 = <<2*617=1234>>1,234 eggs.\n#### 1,234"
MINERVA = r"\[ v = \boxed{1.6} \mathrm{~cm} \]"
VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "Q"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule"},
    "extra_info": {"index": "a-1"},
}
DAPO = {
    "prompt": [{"role": "user", "content": DAPO_PROMPT}],
    "reward_model": {"ground_truth": "5"},
}
OLYMPIAD = {"question": "Q", "final_answer": ["$\\frac{41}{12}$"], "unit": "km", "error": ""}
FORMATS = {  # record -> question, answer
    "MATH": ({"problem": "P", "solution": BOXES, "level": "Level 5"}, "P", r"\frac{1}{2}"),
    "MATH-500": ({"problem": "P", "solution": r"\boxed{9}", "answer": "8", "level": 5}, "P", "8"),
    "GSM8K": ({"question": "Q", "answer": GSM8K}, "Q", "1,234"),
    "AMC23": ({"id": 0, "problem": "P", "answer": 27.0, "question": "P"}, "P", "27"),
    "AIME25": ({"question": "Q", "answer": "070"}, "Q", "070"),
    "Minerva": ({"problem": "P", "solution": MINERVA, "type": "Physics", "idx": 0}, "P", "1.6"),
    "percent behind the box": ({"problem": "P", "solution": r"Hence \boxed{12}\%."}, "P", r"12\%"),
    "OlympiadBench": ({"question": "Q", "final_answer": ["$2^{9}$"], "unit": None}, "Q", "$2^{9}$"),
    "OlympiadBench unit": (OLYMPIAD, "Q", r"\frac{41}{12} km"),
    "OlympiadBench list": ({"question": "Q", "final_answer": ["1", "-1"]}, "Q", "1, -1"),
    "Omni-MATH": ({"problem": "P", "answer": "\\(2n\\)", "difficulty": 8.0}, "P", "\\(2n\\)"),
    "verl": (VERL, "Q", "34"),
    "DAPO-Math-17k": (DAPO, "What is $2+3$?", "5"),
    "plain prompt": ({"prompt": "Q", "ground_truth": 0.5}, "Q", "0.5"),
}


@pytest.mark.parametrize(("record", "question", "answer"), FORMATS.values(), ids=FORMATS)
def test_every_public_format(tmp_path, record, question, answer):
    """Fault: a data set that users have does not load, or its gold is a whole solution, a list's
    text, 27.0 or the wrong box."""
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps([record]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "p.parquet")
    for file in ("p.jsonl", "p.json", "p.parquet"):
        (problem,) = load_problems(str(tmp_path / file))
        assert (problem.prompt, problem.answer, problem.kind) == (question, answer, "math")
        assert (
            verify(problem, rf"It is \boxed{{{answer}}}.").correct
            and not verify(problem, r"It is \boxed{77}.").correct
        )


def test_csv(tmp_path):
    """Fault: quoted commas and line breaks split a record, or a short line loses its answer
    silently."""
    file = tmp_path / "p.csv"
    file.write_text('question,answer\n"What is 1+1,\nplease?",2\n3+3?,6\n', encoding="utf-8")
    assert [(p.prompt, p.answer) for p in load_problems(str(file))] == [
        ("What is 1+1,\nplease?", "2"),
        ("3+3?", "6"),
    ]
    file.write_text("question,answer\n1+1?\n", encoding="utf-8")
    with pytest.raises(UserError, match="p.csv: line 2 has another number of fields"):
        load_problems(str(file))


def test_countdown_tasks_file(tmp_path):
    """Fault: nums and target are not read, or the same game with its numbers in another order
    counts twice."""
    file = tmp_path / "c.jsonl"
    games = [([44, 19, 35], 98), ([19, 35, 44], 98), ([1, 2], 3)]
    file.write_text("".join(json.dumps({"nums": n, "target": t}) + "\n" for n, t in games))
    problems = load_problems(str(file))
    assert [(p.kind, p.numbers, p.target) for p in problems] == [
        ("countdown", (44, 19, 35), 98),
        ("countdown", (1, 2), 3),
    ]
    assert verify(problems[0], "44 + 19 + 35").correct
    file.write_text('{"nums": "many", "target": 98}\n')
    with pytest.raises(UserError, match="c.jsonl:1: field 'nums': expected a list of integers"):
        load_problems(str(file))


def test_tolerance_of_olympiadbench(tmp_path):
    """Fault: the data set's error field is ignored, or a tolerance accepts what lies outside it, or
    in another unit."""
    file = tmp_path / "o.jsonl"
    file.write_text('{"question": "Q", "final_answer": ["4.2"], "unit": "%", "error": "1e-1"}\n')
    (problem,) = load_problems(str(file))
    for answer, correct in (
        ("4.2", True),
        (r"4.29\%", True),
        ("4.11", True),
        ("4.31", False),
        ("-4.2", False),
        (r"420\%", False),
    ):
        assert verify(problem, rf"\boxed{{{answer}}}").correct == correct, answer
    file.write_text('{"question": "Q", "final_answer": ["4.2"], "error": "small"}\n')
    with pytest.raises(UserError, match="o.jsonl:1: field 'error'"):
        load_problems(str(file))


def test_repeated_questions_are_counted_and_left_out(tmp_path, capsys):
    """Fault: DAPO's AIME-2024 counts each problem 32 times, or one of two contradictory answers
    becomes the gold."""
    file = tmp_path / "p.jsonl"
    rows = [
        ("1 + 1?", "2"),
        ("1 +  1?", "2.0"),
        ("1 + 1?", "2"),
        ("x?", "3"),
        ("x?", "4"),
        ("y?", "5"),
    ]
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    assert [(p.prompt, p.answer) for p in load_problems(str(file))] == [
        ("1 + 1?", "2"),
        ("y?", "5"),
    ]
    printed = capsys.readouterr().out
    assert (
        "6 records, of which 3 are different questions" in printed
        and "1 questions with contradicting answers are left out, the first at" in printed
        and "p.jsonl:5" in printed
    )


def test_train_eval_overlap_is_refused(countdown_toml, tmp_path):
    """Fault: held-out accuracy is measured on training questions, told apart by white space."""
    train, heldout = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?", "answer": "4"}\n')
    heldout.write_text(
        '{"problem": "3+3?", "answer": "6"}\n{"problem": " 2+2?\\n", "answer": "4"}\n'
    )
    options = ["--data.train_size", "0", "--data.eval_size"]
    options = [*options, "0", "--data.train", str(train), "--data.eval", str(heldout)]
    message = "1 of 2 questions of data.eval are also in data.train, the first is 'eval.jsonl:2'"
    with pytest.raises(UserError, match=message):
        load_data(load_config(countdown_toml, options))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"problem": "P", "solution": "no box"},
            "has no 'answer', and its field 'solution' no \\boxed{}",
        ),
        ({"problem": "P", "solution": r"\boxed{\frac{1}{}"}, "has no 'answer'"),
        (
            {"prompt": [{"role": "assistant", "content": "hi"}], "answer": "1"},
            "field 'prompt': expected messages of role and content",
        ),
        (
            {"prompt": ["hi"], "answer": "1"},
            "field 'prompt': expected messages of role and content",
        ),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"style": "rule"}},
            "has no 'answer'",
        ),
        (
            {"prompt": "Q", "reward_model": {"ground_truth": "\\frac{1"}},
            "gold answer '\\\\frac{1'",
        ),
        ({"problem": "P", "answer": {"value": 1}}, "field 'answer': expected text"),
    ],
)
def test_broken_field_is_named(tmp_path, record, message):
    """Fault: a record of a known format with a broken field becomes a problem that nothing solves,
    or that anything solves."""
    (tmp_path / "p.json").write_text(json.dumps([{"problem": "ok", "answer": "1"}, record]))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_problems(str(tmp_path / "p.json"))
    assert "p.json:2: " in str(error.value)


def test_every_unreadable_gold_is_listed(tmp_path):
    """Fault: a data set with three unreadable gold answers takes three runs to correct."""
    golds = ["1", "\\frac{1", "2", "", "3)("]
    (tmp_path / "p.json").write_text(
        json.dumps([{"problem": f"P{i}", "answer": gold or "{{"} for i, gold in enumerate(golds)])
    )
    with pytest.raises(UserError, match="3 of 5 gold answers are unreadable") as error:
        load_problems(str(tmp_path / "p.json"))
    assert all(f"p.json:{i}: gold answer" in str(error.value) for i in (2, 4, 5))


def loaded(path, *records) -> list:
    """The problems of a .jsonl file; a record may be its text."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_problems(str(path))


def test_a_question_is_its_whole_conversation(tmp_path, capsys):
    """Fault: questions are merged, and left out as contradictory, that differ in an earlier
    message, in a role, in where a message ends, or in white space that divides numbers."""
    system, user = {"role": "system", "content": "A."}, {"role": "user", "content": "Q"}
    conversations = [
        [user],
        [system, user],
        [system | {"content": "B."}, user],
        [system | {"role": "user"}, user],
        [user, {"role": "assistant", "content": "1"}, user],
        [system | {"content": "A.  Q"}, user],
        [system, {"role": "user", "content": "Q Q"}],
        [{"role": "user", "content": "1 23"}],
        [{"role": "user", "content": "12 3"}],
    ]
    records = [{"prompt": c, "answer": i} for i, c in enumerate(conversations)]
    assert [p.answer for p in loaded(tmp_path / "p.jsonl", *records)] == list("012345678")
    folded = [{"role": "system", "content": " A.\n"}, {"role": "user", "content": "Q\t "}]
    again = loaded(tmp_path / "q.jsonl", records[1], {"prompt": folded, "answer": 2}, records[0])
    assert [p.answer for p in again] == ["0"]
    assert "1 questions with contradicting answers" in capsys.readouterr().out


USER = {"role": "user", "content": "Q"}
PARTS = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
BRIEF = [{"role": "system", "content": "Be brief."}, USER]


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"messages": BRIEF}, True),
        ({"prompt": [{"role": "system", "content": PARTS}, USER]}, True),
        ({"prompt": json.dumps(BRIEF)}, True),
        ({"question": json.dumps(BRIEF, indent=1)}, True),
        ({"prompt": json.dumps(USER)}, False),
        ({"prompt": USER}, False),
        ({"prompt": [USER | {"tool_calls": None, "name": None}]}, False),
        ({"problem": "", "messages": [USER]}, False),
    ],
)
def test_every_notation_of_messages(tmp_path, fields, context):
    """Fault: a notation of messages that public files have is not read, or its JSON becomes the
    question."""
    (problem,) = loaded(tmp_path / "p.jsonl", fields | {"answer": 1})
    assert problem.prompt == "Q"
    assert problem.context == ((("system", "Be brief."),) if context else ())


@pytest.mark.parametrize("question", ["[3, 1, 2]", "[asy] draw(); [/asy] Q", "{x : x > 1}", '"Q"'])
def test_text_that_looks_like_a_list_stays_text(tmp_path, question):
    """Fault: a question that begins with a bracket is refused, or read as messages."""
    (problem,) = loaded(tmp_path / "p.jsonl", {"problem": question, "answer": 1})
    assert problem.prompt == question and problem.context == ()


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, USER],
        [USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}, USER],
        [USER, {"role": "assistant", "content": None}, USER],
        [USER, {"role": "assistant", "content": "A"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}, PARTS[0]]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": []}],
        [{"role": None, "content": "A"}, USER],
        [{"role": "system", "content": " "}, USER],
        [{"from": "human", "value": "Q"}],
        {"messages": [USER]},
        ["Q"],
        [USER, "Q"],
    ],
    ids=str,
)
def test_messages_that_are_not_text_are_refused(tmp_path, messages):
    """Fault: a tool call, an image or a notation that is not read is left out or becomes "None";
    also where the field holds them as JSON, or as Python or numpy print them."""
    printed = [str(messages), f"array({messages}, dtype=object)", json.dumps(json.dumps(messages))]
    texts = printed if "{" in str(messages) else []
    for value in (messages, json.dumps(messages), *texts):
        with pytest.raises(UserError, match=r"p.jsonl:1: field 'prompt': .*(expected|has no)"):
            loaded(tmp_path / "p.jsonl", {"prompt": value, "answer": "1"})


DEEP = "[" * 1000 + "]" * 1000


@pytest.mark.parametrize(
    ("record", "field"),
    [
        *((f'{{"problem": "P", "answer": {x}}}', "answer") for x in ("1e400", "-Infinity", "NaN")),
        ('{"problem": "P", "answer": [1, 1e400]}', "answer"),
        ('{"problem": "P", "answer": %s}' % ("7" * 5000), "gold answer"),
        (f'{{"problem": "P", "answer": {DEEP}}}', "maximum recursion depth"),
        (f'{{"problem": "P", "answer": "1", "level": {DEEP}}}', "maximum recursion depth"),
        ({"problem": "P", "answer": DEEP}, "gold answer"),
        ({"problem": "P", "answer": "\ud800"}, "answer"),
        ({"problem": "P", "answer": "1\0"}, "answer"),
        ({"problem": "P\udfff", "answer": "1"}, "problem"),
        ({"problem": "P\0", "answer": "1"}, "problem"),
        ({"prompt": [USER | {"content": "\ud83d"}], "answer": "1"}, "prompt"),
        ({"prompt": [USER | {"content": "\0"}, USER], "answer": "1"}, "prompt"),
        ({"problem": "P", "answer": "1", "unit": "m\0"}, "unit"),
        ({"problem": "P", "solution": "\\boxed{1}\0"}, "solution"),
        ({"problem": "P", "answer": "1", "id": "\ud800"}, "id"),
        *(({"problem": "P", "answer": "1", "error": e}, "error") for e in ("nan", "-1", "1e400")),
        ('{"problem": "P", "answer": "1", "error": %s}' % ("7" * 5000), "error"),
        ('{"problem": "P", "answer": "1", "error": 1e400}', "error"),
        ('{"nums": [1e400, 2], "target": 3}', "nums"),
        ('{"nums": [1, 2], "target": NaN}', "target"),
        ('{"nums": [1, 2], "target": %s}' % ("7" * 5000), "target"),
        ({"nums": [1, 2.5], "target": 3}, "nums"),
        ({"nums": [1, True], "target": 3}, "nums"),
        ({"nums": "12", "target": 3}, "nums"),
        ({"nums": [], "target": 0}, "nums"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_text_or_a_number_is_named(tmp_path, record, field):
    """Fault: a number that is not finite or too long, brackets nested without end, a lone surrogate
    or NUL ends in a bare OverflowError or RecursionError, or loads and fails in the run."""
    with pytest.raises(UserError, match=f"p.jsonl:1: .*{field}"):
        loaded(tmp_path / "p.jsonl", record)


def test_lists_as_text(tmp_path):
    """Fault: lists and verl's judge, which CSV holds as JSON text, are refused or become the gold
    as they are."""
    file, judge = tmp_path / "p.jsonl", json.dumps({"ground_truth": "34", "style": "rule"})
    assert loaded(file, {"problem": "P", "reward_model": judge})[0].answer == "34"
    assert loaded(file, {"problem": "P", "answer": '["34"]'})[0].answer == "34"
    assert loaded(file, {"problem": "P", "answer": "[3, 4]"})[0].answer == "[3, 4]"
    assert loaded(file, {"nums": "[1, 2]", "target": "3"})[0].numbers == (1, 2)


def test_question_that_cannot_be_tokenized_is_refused_at_the_start(countdown_toml, tmp_path):
    """Fault: a run stops in the step that draws a question outside the tokenizer's vocabulary, or a
    conversation that the chat template refuses."""
    loaded(tmp_path / "p.jsonl", {"problem": "make 3 from 1 2:", "answer": 3, "id": "a"})
    loaded(tmp_path / "q.jsonl", {"problem": "Was ist 1 + 2?", "answer": 3, "id": "b"})
    sources = [("data.train", "p.jsonl"), ("data.eval", "q.jsonl")]
    options = [word for key, name in sources for word in (f"--{key}", str(tmp_path / name))]
    options += ["--data.train_size", "0", "--data.eval_size", "0"]
    with pytest.raises(UserError, match="problem 'b': cannot tokenize 'Was ist"):
        load_data(load_config(countdown_toml, options), Tokenizer(BASE))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '{"data": [{"problem": "P", "answer": "1"}]}', "p.json:1: has no 'problem'"),
        ("p.json", "3", "p.json:1: expected an object"),
        ("p.json", "[1, 2", "not valid .json"),
        ("p.jsonl", "\n", "holds no records"),
        ("p.parquet", "PAR", "not valid .parquet"),
    ],
)
def test_broken_file_is_an_error(tmp_path, name, text, message):
    """Fault: a traceback of a library, or an empty training set."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_problems(str(tmp_path / name))


def test_system_message_is_kept(tmp_path):
    """Fault: the messages before the question are lost."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    (tmp_path / "p.json").write_text(
        json.dumps([{"prompt": messages, "reward_model": {"ground_truth": "1"}}])
    )
    (problem,) = load_problems(str(tmp_path / "p.json"))
    assert problem.prompt == "Q" and problem.context == (("system", "Be brief."),)


def test_data_of_a_run(countdown_toml):
    """Fault: seeds are compared on different held-out problems, or share one training set."""
    overrides = ["--data.train_size", "20", "--data.eval_size", "10", "--seed"]
    (train, heldout), (other_train, other_heldout) = (
        load_data(load_config(countdown_toml, [*overrides, seed])) for seed in "01"
    )
    assert heldout == other_heldout and train != other_train
    evaluation = load_config(countdown_toml, [*overrides, "1", "--method", "eval"])
    assert load_data(evaluation) == ([], heldout)


def test_stream_of_problems():
    """Fault: a problem is missed or repeated within a pass, every pass has the same order, or a
    continued run draws other problems."""
    problems = load_problems("countdown:train", size=10)
    stream = next_problems(problems, 0, 20, seed=1)
    passes = [[problem.id for problem in part] for part in (stream[:10], stream[10:])]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(problem.id for problem in problems)
    assert passes[0] != passes[1]
    assert next_problems(problems, 0, 7, 1) + next_problems(problems, 7, 13, 1) == stream
    assert next_problems(problems, 0, 20, seed=2) != stream


def test_problems_with_few_successes_are_drawn_more_often():
    """Fault: the chances are the successes themselves, or not 1 / (1 + successes); a problem is
    drawn twice in a step; a step of the same position draws others."""
    problems = load_problems("countdown:train", size=3)
    successes = {problems[0].id: 8, problems[1].id: 2}  # chances 1 / 9, 1 / 3, 1
    drawn = Counter(
        problem.id
        for position in range(3000)
        for problem in next_problems(problems, position, 1, 5, successes)
    )
    shares = [drawn[problem.id] / 3000 for problem in problems]
    assert shares == pytest.approx([1 / 13, 3 / 13, 9 / 13], abs=0.03)
    pair = next_problems(problems, 7, 2, 5, successes)
    assert pair[0] != pair[1] and pair == next_problems(problems, 7, 2, 5, successes)
    assert len(next_problems(problems, 7, 4, 5, successes)) == 4
    assert next_problems(problems, 7, 2, 5, {}) == next_problems(problems, 7, 2, 5)


# ---- reasoning-gym


def test_gym_splits_share_no_question():
    """Fault: a held-out question among the training questions, or questions that change from
    process to process."""
    options = "?min_terms=2&max_terms=2&min_digits=1&max_digits=2"
    train = [
        load_problems("reasoning_gym:chain_sum" + options, size=200, seed=seed) for seed in (0, 1)
    ]
    heldout = load_problems("reasoning_gym:chain_sum:heldout" + options, size=100, seed=0)
    assert train[0] != train[1] and len({p.prompt for p in train[0]}) == 200
    assert not {p.prompt for p in train[0] + train[1]} & {p.prompt for p in heldout}
    assert [(p.id, p.prompt, p.answer) for p in heldout[:2]] == GYM_HELDOUT


GYM_HELDOUT = [
    (
        "chain_sum:0:6",
        "State the final answer to the following arithmetic problem: 43 + 14 =",
        "57",
    ),
    ("chain_sum:0:15", "State the final answer to the following arithmetic problem: 8 + 0 =", "8"),
]


@pytest.mark.parametrize(
    "task",
    [
        "chain_sum",
        "word_ladder",
        "arc_agi",
        "countdown",
        "spiral_matrix",
        "knight_swap",
        "simple_integration",
    ],
)
def test_gym_scorer_decides(task):
    """Fault: the reference answer of a task is not right, or a partly right one is (scorers give
    those 0.01 and more)."""
    problems = load_problems(f"reasoning_gym:{task}", size=3, seed=2)
    right = verify_many(problems, [f"Let me think.\n<answer>{p.answer}</answer>" for p in problems])
    assert [v.reason for v in right] == ["correct"] * 3
    wrong = verify_many(problems, [f"<answer>{p.answer} 17</answer>" for p in problems])
    assert [v.reason for v in wrong] == ["wrong"] * 3


def test_gym_answer_in_words_or_boxed():
    """Fault: only one way of giving an answer counts, or a marked wrong answer is saved by a right
    number elsewhere."""
    (problem,) = load_problems("reasoning_gym:chain_sum?max_digits=1", size=1)
    good = [problem.answer, f"The answer is {problem.answer}.", rf"\boxed{{{problem.answer}}}"]
    bad = ["", f"<answer>123</answer> {problem.answer}", "The answer is 123."]
    assert [v.correct for v in verify_many([problem] * 6, good + bad)] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "task",
    ["countdown", "puzzle24", "spiral_matrix", "n_queens", "binary_matrix", "string_insertion"],
)
def test_gym_scorers_never_run_an_answer(task, tmp_path):
    """Fault: a scorer that evals the answer runs it: these would write a file."""
    (problem,) = load_problems(f"reasoning_gym:{task}", size=1)
    target = tmp_path / "written"
    calls = [
        f"open('{target}', 'w')",
        f"[open][0]('{target}', 'w')",
        f"(lambda f: f)(open)('{target}', 'w')",
        f"[f for f in [open]][0]  ('{target}', 'w')",
        f"__import__('os').system('touch {target}')",
        f"pow.__self__.open('{target}', 'w')",
    ]
    assert not any(v.correct for v in verify_many([problem] * len(calls), calls))
    assert not target.exists()


def test_gym_scorer_is_killed_at_its_deadline():
    """Fault: an answer that takes a scorer for ever stops the run."""
    (problem,) = load_problems("reasoning_gym:countdown", size=1)
    verify(problem, "1")  # the worker has imported what it needs
    start = time.perf_counter()
    assert verify(problem, "9**9**9**9", timeout_s=1.0).reason in ("timeout", "wrong")
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        ("reasoning_gym:no_such_task", 3, "'no_such_task' not registered"),
        ("reasoning_gym:chain_sum?terms=3", 3, "unexpected keyword argument 'terms'"),
        (
            "reasoning_gym:chain_sum:test",
            3,
            "expected reasoning_gym:TASK[:heldout][?options]",
        ),
        ("reasoning_gym:chain_sum", 0, "must be given"),
        (
            "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1",
            5000,
            "5000 wanted",
        ),
    ],
)
def test_bad_gym_source_is_an_error(source, size, message):
    """Fault: a traceback of the worker, or an endless search for questions that do not exist."""
    with pytest.raises(UserError, match=re.escape(message)):
        load_problems(source, size=size)


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        ("countdown:test", 5, "unknown split"),
        ("countdown:train", 0, "must be given"),
        ("countdown:train?number=4", 5, "number=4: the options are"),
        ("countdown:train?numbers", 5, "numbers=: the options are"),
        ("countdown:train?numbers=-4", 5, "numbers=-4: the options are"),
        ("countdown:train?numbers=9", 5, "numbers=9: the options are"),
        ("countdown:train?max=100", 5, "max=100: the options are"),
        ("no.jsonl", 0, "expected countdown:SPLIT, reasoning_gym:TASK or an existing .jsonl"),
        (
            "problems.xlsx",
            0,
            "expected countdown:SPLIT, reasoning_gym:TASK or an existing .jsonl",
        ),
    ],
)
def test_bad_source_is_an_error(source, size, message):
    """Fault: a traceback for a mistyped source, or an option that is silently ignored."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(source, size=size)


def test_exhausted_split_is_an_error():
    """Fault: an endless search for games that do not exist."""
    with pytest.raises(ValueError, match="games of 3 numbers up to 4 found, 500 wanted"):
        load_problems("countdown:train?max=4", size=500)


def test_demonstrations_from_a_file(tmp_path):
    """Fault: SFT on one's own demonstrations is not possible, or a missing response passes."""
    file = tmp_path / "d.jsonl"
    file.write_text('{"problem": "1+1?", "response": "2"}\n', encoding="utf-8")
    assert load_demonstrations(str(file)) == [("1+1?", "2")]
    file.write_text('{"problem": "1+1?"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="d.jsonl:1: has no 'response'"):
        load_demonstrations(str(file))


def test_demonstration_with_a_conversation_is_refused(tmp_path):
    """Fault: SFT leaves out the messages before a question without a word."""
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"messages": BRIEF, "response": "2"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="d.jsonl:1: 1 messages before the question"):
        load_demonstrations(str(file))


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [("countdown:train", 5, "countdown:skills"), ("countdown:habit", 0, "must be given")],
)
def test_bad_demonstrations_are_an_error(source, size, message):
    """Fault: method "sft" with the default data.train fine-tunes on nothing, or on problems."""
    with pytest.raises(ValueError, match=message):
        load_demonstrations(source, size=size)


def test_sft_learns_the_demonstrations_of_data_train(tmp_path):
    """Fault: method "sft" has no source of demonstrations, or takes another number of them."""
    overrides = "--data.train_size 40 --rft.batch_size 16 --data.eval_size 2 --eval.num_samples 2"
    overrides += f" --model.path {BASE}"
    cfg = load_config(
        ROOT / "configs" / "countdown_base.toml",
        [*overrides.split(), "--run_dir", str(tmp_path / "run")],
    )
    rloop.run_method(cfg)
    records = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert sum(record["phase"] == "rft" for record in records) == 3  # 40 in batches of 16
    assert (tmp_path / "run/policies/sft/model.safetensors").exists()
