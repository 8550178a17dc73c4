"""data/: games that can be solved and share nothing between splits, demonstrations with right arithmetic, errors that name the line."""

import itertools
import json
import re
from fractions import Fraction

import pytest
from conftest import ROOT

from data import countdown, load_demonstrations, load_problems
from data.tokenizer import Tokenizer

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
    for problem in load_problems("countdown:train", size=150, seed=3) + load_problems("countdown:heldout", size=50, countdown_numbers=4):
        assert problem.target in reachable(problem.numbers) and problem.target != sum(problem.numbers)
        assert 1 <= problem.target <= 99 and problem.prompt == countdown.question(problem.numbers, problem.target)


def test_splits_share_no_numbers_for_any_seed():
    """Fault: a held-out game, or the same numbers with another target, among the training games or demonstrations."""
    numbers = {
        split: {tuple(sorted(n)) for seed in range(3) for n, _ in
                countdown.generate_games(split, size=300, seed=seed, num_numbers=3, max_number=20)}
        for split in SPLITS
    }  # fmt: skip
    for stage in countdown.STAGES:
        demos = countdown.generate_demonstrations(stage, size=2000, seed=0, num_numbers=3, max_number=20)
        numbers["demonstrations"] |= {tuple(sorted(n)) for n, _, _ in demos}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not numbers[a] & numbers[b]


def test_games_are_unique_and_seeded():
    """Fault: the same game twice (with its numbers in another order), or games that change from run to run."""
    problems = load_problems("countdown:train", size=400, seed=1)
    assert len({(tuple(sorted(p.numbers)), p.target) for p in problems}) == len({p.id for p in problems}) == 400
    assert problems == load_problems("countdown:train", size=400, seed=1) != load_problems("countdown:train", size=400, seed=2)
    assert [p.id for p in load_problems("countdown:heldout", size=3)] == HELDOUT


HELDOUT = ["countdown:2,15,13->43", "countdown:7,11,15->88", "countdown:3,5,18->49"]


@pytest.mark.parametrize(("stage", "wrong_targets", "in_order"), [("skills", 0.3, 1 / 3), ("habit", 1.0, 0.9 + 0.1 / 3)])
def test_demonstrations_have_right_arithmetic(stage, wrong_targets, in_order):
    """Fault: the base policy is taught wrong arithmetic, or the shares of wrong targets and of the habit are not what they say."""
    demos = countdown.generate_demonstrations(stage, size=4000, seed=0, num_numbers=3, max_number=20)
    wrong, first_two = 0, 0
    for numbers, target, steps in demos:
        board = list(numbers)
        for step in steps.split(", "):
            a, operator, b, value = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step).groups()
            first_two += len(board) == 3 and sorted(board[:2]) == sorted((int(a), int(b)))
            board.remove(int(a)), board.remove(int(b))
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator] == int(value) <= 99
            board.append(int(value))
        assert len(board) == 1
        wrong += board[0] != target
    assert abs(wrong / 4000 - wrong_targets) < 0.05 and abs(first_two / 4000 - in_order) < 0.06


def test_tokenizer_file_is_what_the_code_builds(tmp_path):
    """Fault: tokenizer.json and its builder drift apart, or the model's vocabulary does not fit."""
    countdown.build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads((BASE / "tokenizer.json").read_text())
    config = json.loads((BASE / "config.json").read_text())
    assert config["vocab_size"] == countdown.build_tokenizer().get_vocab_size()


def test_tokenizer_round_trip():
    """Fault: numbers split into digits, signs lost, or the stop token visible in the text."""
    tokenizer = Tokenizer(BASE)
    ids = tokenizer.encode("make 16 from 3 5 20:")
    assert len(ids) == 7 and tokenizer.stop_ids == {tokenizer.eos_id} == {0}
    assert tokenizer.decode([*tokenizer.encode("3 + 5 = 8, 8 * (2 / 1) = 16"), 0]) == "3 + 5 = 8 , 8 * ( 2 / 1 ) = 16"


def test_text_outside_the_vocabulary_is_an_error():
    """Fault: unknown words vanish from the prompt in silence."""
    with pytest.raises(ValueError, match="cannot tokenize 'make 100 from 3'"):
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
    with pytest.raises(ValueError, match="EOS"):
        Tokenizer(tmp_path)


def test_jsonl_problems(tmp_path):
    """Fault: numeric answers or the question alias are refused, or blank lines count."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2", "id": "a"}\n\n{"question": "2+2?", "answer": 4}\n', encoding="utf-8")
    problems = load_problems(str(file))
    assert [(p.id, p.prompt, p.answer, p.kind) for p in problems] == [("a", "1+1?", "2", "math"), ("p.jsonl:3", "2+2?", "4", "math")]
    assert len(load_problems(str(file), size=1, seed=5)) == 1
    with pytest.raises(ValueError, match="3 records wanted, it holds 2"):
        load_problems(str(file), size=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "y", "answer": "2", "id": "a"}', "p.jsonl:2: id 'a' stands in the file twice"),
        ('{"problem": "x", "answer": "1"', "p.jsonl:2: not valid JSON"),
        ('["x"]', "p.jsonl:2: expected an object"),
        ('{"problem": "x"}', "p.jsonl:2: has no 'answer'"),
        ('{"problem": " ", "answer": "1"}', "p.jsonl:2: has no 'problem'"),
        ('{"problem": "x", "answer": null}', "p.jsonl:2: has no 'answer'"),
        ('{"problem": "x", "answer": "\\\\frac{1}{"}', "p.jsonl:2: "),
    ],
)
def test_broken_line_names_file_and_line(tmp_path, line, message):
    """Fault: a broken record is skipped, problems of one id merge, or the error does not say where it is."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "x", "answer": "1", "id": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(str(file))


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        ("countdown:test", 5, "unknown split"),
        ("countdown:train", 0, "must be given"),
        ("no.jsonl", 0, "not found"),
        ("problems.xlsx", 0, "expected countdown:train"),
    ],
)
def test_bad_source_is_an_error(source, size, message):
    """Fault: a traceback for a mistyped source."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(source, size=size)


def test_exhausted_split_is_an_error():
    """Fault: an endless search for games that do not exist."""
    with pytest.raises(ValueError, match="games of 3 numbers up to 4 found, 500 wanted"):
        load_problems("countdown:train", size=500, countdown_max=4)


def test_demonstrations_from_a_file(tmp_path):
    """Fault: SFT on one's own demonstrations is not possible, or a missing response passes."""
    file = tmp_path / "d.jsonl"
    file.write_text('{"problem": "1+1?", "response": "2"}\n', encoding="utf-8")
    assert load_demonstrations(str(file)) == [("1+1?", "2")]
    file.write_text('{"problem": "1+1?"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="d.jsonl:1: has no 'response'"):
        load_demonstrations(str(file))
