"""talk.py: a policy answers what it is asked, and nothing that is asked or answered does harm."""

import io
import math
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, random_model
from test_tokenizer import CHATML, write_checkpoint

import rloop
import talk
from data.tokenizer import Tokenizer
from model import Transformer
from sampler import Completion, sample

BASE = str(ROOT / "data" / "countdown_base")
QUESTION = "make 24 from 3 5 9:"
FEW = ("--num_samples", "2")
HEADER = re.compile(r"^\[(\d)\] (\d+) tokens(, CUT OFF)?, mean probability (\d\.\d\d)$", re.M)


def ask(capsys, *arguments: str) -> str:
    assert rloop.main(["--sample", *arguments]) == 0
    return capsys.readouterr().out


def pipe(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.fixture
def chat(tmp_path, monkeypatch) -> list:
    """A random chat model in tmp_path; its calls of sample are added to the list."""
    write_checkpoint(tmp_path, "llama3", chat_template=CHATML)
    random_model(TINY | {"vocab_size": 420}).save_pretrained(tmp_path)
    calls = []

    def spy(model, prompts, **options):
        calls.append((prompts, options))
        return sample(model, prompts, **options)

    monkeypatch.setattr(talk, "sample", spy)
    return calls


def test_responses_are_those_of_sample(capsys):
    """Fault: another prompt, seed, temperature or limit than asked for; a wrong figure; a response
    that was cut off looks finished."""
    output = ask(
        capsys, BASE, QUESTION, "--temperature", "0.7", "--seed", "5", "--max_new_tokens=9"
    )
    tokenizer, policy = Tokenizer(BASE), Transformer.from_pretrained(BASE)
    options = {"num_samples": 4, "max_new_tokens": 9, "temperature": 0.7, "seed": 5}
    prompts = [tokenizer.encode(QUESTION, add_special_tokens=True)]
    (expected,) = sample(policy, prompts, stop_ids=tokenizer.stop_ids, max_rows=9, **options)
    lines = output.splitlines()
    assert lines[1::2] == [tokenizer.decode(completion.ids) for completion in expected]
    for n, (line, completion) in enumerate(zip(lines[::2], expected, strict=True), start=1):
        probability = f"{math.exp(sum(completion.logps) / len(completion.ids)):.2f}"
        found = HEADER.fullmatch(line).groups()
        assert found == (str(n), str(len(completion.ids)), found[2], probability)
        assert (found[2] is None) == completion.finished
    assert "CUT OFF" in output
    assert ask(capsys, BASE, QUESTION, "--seed", "5") != ask(capsys, BASE, QUESTION, "--seed", "6")


def test_temperature_0_is_one_greedy_response(capsys):
    """Fault: four times the same response, or one that is drawn."""
    outputs = {ask(capsys, BASE, QUESTION, "--temperature", "0", "--seed", s) for s in ("1", "2")}
    assert len(outputs) == 1 and len(HEADER.findall(*outputs)) == 1


def test_a_chat_model_is_asked_in_its_template(tmp_path, chat, capsys):
    """Fault: a chat model gets plain text, does not stop at the end of its turn, or samples ids
    that it has no token for; --plain does nothing."""
    ask(capsys, str(tmp_path), "Is 7 prime?", "--max_new_tokens", "5")
    ask(capsys, str(tmp_path), "Is 7 prime?", "--max_new_tokens", "5", "--plain")
    tokenizer = Tokenizer(tmp_path, chat=True)
    text = tokenizer.render_chat([{"role": "user", "content": "Is 7 prime?"}])
    plain = Tokenizer(tmp_path)
    asked = [(prompts, options["stop_ids"]) for prompts, options in chat]
    assert asked == [
        ([tokenizer.encode(text)], tokenizer.stop_ids),
        ([plain.encode("Is 7 prime?", add_special_tokens=True)], plain.stop_ids),
    ]
    assert tokenizer.encode("<|eot|>")[0] in tokenizer.stop_ids


def test_ids_without_a_token_are_not_sampled(tmp_path, chat, capsys, monkeypatch):
    """Fault: a response holds ids that a run never samples, and that decoding loses."""
    ask(capsys, str(tmp_path), "?", "--max_new_tokens", "20", "--num_samples", "99")
    known = 420 - len(Tokenizer(tmp_path).unknown_ids(420))
    assert known < 420
    found = []
    monkeypatch.setattr(talk, "sample", lambda *a, **o: found.append(sample(*a, **o)) or found[-1])
    ask(capsys, str(tmp_path), "?", "--max_new_tokens", "20", "--num_samples", "99")
    assert 0 <= max(id_ for c in found[0][0] for id_ in c.ids) < known


def test_piped_questions_are_answered_one_by_one(monkeypatch, capsys):
    """Fault: a line is lost, a blank one is a question, the last line needs a line break, nobody
    sees which answer is to which question, or a question asked again gets the same responses."""
    other = "make 10 from 1 2 7:"
    pipe(monkeypatch, f"{QUESTION}\n\n  \n{other}\r\n{QUESTION}".encode())
    output = ask(capsys, BASE, *FEW)
    parts = [part.partition("\n") for part in output.split("> ")[1:]]
    assert [question for question, _, _ in parts] == [QUESTION, other, QUESTION]
    assert all(len(HEADER.findall(answers)) == 2 for _, _, answers in parts)
    assert parts[0] != parts[2]
    assert parts[0][2] == ask(capsys, BASE, QUESTION, *FEW)


def test_control_characters_do_not_reach_the_terminal(tmp_path, chat, capsys, monkeypatch):
    """Fault: a response, or a question from a file, moves the cursor, clears the screen, sets the
    title or reorders the line."""
    evil = "a\x1b[2J\x1b]0;t\x07\r\x08\x9b1m\u202e\u2028\x00"
    tokenizer = Tokenizer(tmp_path)
    response = Completion(tokenizer.encode(f"{evil}\n\t\\x1b é数😀"), [0.0], True)
    monkeypatch.setattr(talk, "sample", lambda *_, **__: [[response]])
    pipe(monkeypatch, f"{evil}\n".encode())
    output = ask(capsys, str(tmp_path))
    assert all(c.isprintable() or c in "\n\t" for c in output)
    shown = r"a\x1b[2J\x1b]0;t\x07\r\x08\x9b1m\u202e\u2028\x00"
    assert output.count(shown) == 2 and f"{shown}\n\t\\x1b é数😀\n" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", QUESTION), "nowhere/tokenizer.json: not a tokenizer: No such file"),
        ((str(ROOT / "docs"), QUESTION), "docs/tokenizer.json: not a tokenizer: No such file"),
        ((BASE, ""), "the question is empty"),
        ((BASE, " \n"), "the question is empty"),
        ((BASE, "große 7"), "cannot tokenize 'große 7'"),
        ((BASE, "a\udcff"), "cannot tokenize 'a\\udcff'"),
        ((BASE, QUESTION, "--top_p", "0.9"), "unrecognized arguments: --top_p 0.9"),
        ((BASE, *QUESTION.split()), "unrecognized arguments: 24 from 3 5 9:"),
        ((BASE, QUESTION, "--num_samples", "0"), "--num_samples 0: must be at least 1"),
        ((BASE, QUESTION, "--max_new_tokens", "0"), "--max_new_tokens 0: must be at least 1"),
        ((BASE, QUESTION, "--temperature", "-1"), "--temperature -1.0: must be at least 0"),
        ((BASE, QUESTION, "--temperature", "nan"), "--temperature nan: must be at least 0"),
        ((BASE, QUESTION, "--seed", "-1"), "--seed -1: must be at least 0"),
        ((BASE, QUESTION, "--seed", "x"), "argument --seed: invalid int value: 'x'"),
        ((), "argument --sample: expected one argument"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    """Fault: a traceback, a page of usage, or responses to something that was not asked."""
    assert rloop.main(["--sample", *arguments]) == 1
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_a_piped_line_outside_the_vocabulary_ends_it(monkeypatch, capsys):
    """Fault: a traceback for bytes that are no UTF-8, or answers that are silently one too few."""
    pipe(monkeypatch, f"{QUESTION}\n".encode() + b"a\xff\n" + QUESTION.encode())
    assert rloop.main(["--sample", BASE, *FEW]) == 1
    output, error = capsys.readouterr()
    assert len(HEADER.findall(output)) == 2
    assert error.startswith("error: cannot tokenize 'a\\udcff'") and error.count("\n") == 1


@pytest.mark.parametrize("end", ["end of file", "Ctrl-C"])
def test_on_a_terminal(end):
    """Fault: no prompt; a line outside the vocabulary ends the talk; Ctrl-D or Ctrl-C shows a
    traceback, or speaks of a run's checkpoint."""
    terminal, stdin = pty.openpty()
    command = [sys.executable, "rloop.py", "--sample", BASE, *FEW]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, stdin=stdin, **pipes)
    os.write(terminal, f"hello\n{QUESTION}\n".encode())
    lines = []
    while len(HEADER.findall("".join(lines))) < 2:
        lines.append(process.stdout.readline())
        assert process.poll() is None, process.stderr.read()
    if end == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        os.write(terminal, b"\x04")
    _, error = process.communicate(timeout=60)
    os.close(terminal)
    os.close(stdin)
    assert process.returncode == (130 if end == "Ctrl-C" else 0)
    assert "error: cannot tokenize 'hello'" in "".join(lines) and "> " in "".join(lines)
    assert error.strip() == ""


def test_help_names_it(capsys):
    """Fault: nobody finds it, or its options."""
    for arguments, named in ((["--help"], "--sample"), (["--sample", "x", "-h"], "--temperature")):
        with pytest.raises(SystemExit) as end:
            rloop.main(arguments)
        assert end.value.code == 0 and named in capsys.readouterr().out
