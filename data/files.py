"""Records of .jsonl, .json, .csv and .parquet files, and the field names of public data sets."""

import contextlib
import csv
import json
import math
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path

from answers.extract import extract_boxed
from config import UserError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
QUESTIONS = ("problem", "question", "prompt", "messages", "Problem", "Question")
JUDGE = "reward_model.ground_truth"  # verl
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", JUDGE, "Answer")
IDS = ("id", "unique_id")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL and lone surrogates: no tokenizer takes them
# messages, as JSON, Python or numpy print them
_MESSAGES = re.compile(
    r"""(?s)["(\[\sa-z]{0,20}\{.{0,99}?['"](role|content|from|value)\\*['"]\s*:"""
)
# a very long integer stays text, and check_gold refuses it
_json = json.JSONDecoder(parse_int=lambda n: int(n) if len(n) <= 1000 else n).decode

# DAPO-Math-17k and its AIME-2024 put their prompt template into each question; data.prompt is ours.
_DAPO = re.compile(
    r"\s*Solve the following math problem step by step\. The last line of your response should be "
    r"of the form Answer:[^\n]*\n\s*(.*?)"
    r'(?:\s*Remember to put your answer on its own line after "Answer:"\.\s*)?',
    re.DOTALL,
)


def read_records(path: str) -> Iterator[tuple[dict, str]]:
    """Records of a file and their places: "x.jsonl:17" is line 17, in other files record 17."""
    if not (path.endswith(EXTENSIONS) and Path(path).is_file()):
        kinds = "countdown:SPLIT, reasoning_gym:TASK or an existing .jsonl, .json, .csv or .parquet"
        raise UserError(f"data source {path!r}: expected {kinds} file")
    record, where = None, path
    try:
        for number, row in enumerate(_rows(path), start=1):
            where = f"{path}:{number}"
            if isinstance(row, str) and not row.strip():
                continue
            record = _json(row) if isinstance(row, str) else row
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected an object, got {str(record)[:60]!r}")
            yield record, where
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # of any of the formats
        raise UserError(f"{where}: not valid {Path(path).suffix}: {error}") from None
    if record is None:
        raise UserError(f"data source {path}: holds no records")


def _rows(path: str) -> Iterator:
    """The rows of a file: the lines of a .jsonl file, else records."""
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=10_000):
            yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.endswith(".jsonl"):
            yield from file
        elif path.endswith(".json"):
            records = _json(file.read())
            yield from records if isinstance(records, list) else [records]
        else:
            csv.field_size_limit(2**31 - 1)
            reader = csv.DictReader(file)
            for record in reader:
                if None in record or None in record.values():
                    place = f"{path}: line {reader.line_num}"
                    raise UserError(f"{place} has another number of fields than the header line")
                yield record


def question(record: dict, where: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The question's text, and the (role, content) messages before it in a list of messages."""
    name = next((name for name in QUESTIONS if record.get(name)), None)
    messages, context = structure(record.get(name), name, where), []
    messages = [messages] if isinstance(messages, dict) else messages
    if isinstance(messages, list):
        good = all(isinstance(m, dict) and not m.get("tool_calls") for m in messages)
        if not good or messages[-1].get("role") != "user":
            wanted = "messages of role and content, no tool calls, the last one the user's"
            raise field_error(where, name, wanted, messages)
        place = f"{where}: field {name!r}"
        pairs = [[text_of(m, (key,), place) for key in ("role", "content")] for m in messages]
        *context, (_, text) = map(tuple, pairs)
    else:
        text = text_of(record, QUESTIONS, where)
    dapo = _DAPO.fullmatch(text)
    return dapo[1] if dapo else text, tuple(context)


def structure(value, name: str, where: str):
    """The list or object that a field holds as JSON text (CSV, some parquet files), else the value.
    A list of numbers is text. Raises UserError for messages in another notation."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        found = _json(value) if value.lstrip()[:1] in ("[", "{") else []
        if isinstance(found, dict) or any(isinstance(item, (str, dict)) for item in found):
            return found
    if _MESSAGES.match(value):
        raise field_error(where, name, "JSON or text", value)
    return value


def gold_answer(record: dict, where: str) -> tuple[str, float]:
    """The gold answer's text and its absolute tolerance.

    The text comes from reward_model.ground_truth (verl), else from an answer field, whose list is
    joined (OlympiadBench), else from the last \\boxed of the solution (MATH, Minerva). Only what
    follows `####` counts (GSM8K). The record's unit is added. Raises UserError.
    """
    judge = structure(record.get("reward_model"), "reward_model", where)
    if isinstance(judge, dict):
        record = {JUDGE: judge.get("ground_truth")}
    name = next((name for name in ANSWERS if record.get(name) not in (None, "", [])), None)
    answer = structure(record.get(name), name, where)
    if name is None and "solution" in record:
        text = extract_boxed(text_of(record, ("solution",), where))
        if text is None:
            raise UserError(f"{where}: has no 'answer', and its field 'solution' no \\boxed{{}}")
    elif isinstance(answer, list):
        text = ", ".join(text_of({name: item}, (name,), where) for item in answer)
    else:
        text = text_of(record, ANSWERS, where)
    text = text.rpartition("####")[2].strip()
    if isinstance(record.get("unit"), str) and record["unit"].strip() and "," not in text:
        text = f"{text.strip('$')} {text_of(record, ('unit',), where).strip().strip('$')}"
    error = record.get("error")  # OlympiadBench: a number, or one for each of several answers
    try:
        tolerance = min(map(float, str(error).split(","))) if error else 0.0
        if not 0 <= tolerance < math.inf:
            raise ValueError
        return text, tolerance
    except ValueError:
        raise field_error(where, "error", "a number from 0 on", error) from None


def text_of(record: dict, names: tuple[str, ...], where: str) -> str:
    """The first filled one of the named fields; a number becomes its shortest text (27.0: 27), and
    the parts of a message are joined. Raises UserError for what no tokenizer takes, inf, NaN."""
    for name in names:
        value = record.get(name)
        if isinstance(value, list) and all(isinstance(p, dict) for p in value):
            texts = [part.get("type") == "text" and part.get("text") for part in value]
            value = "".join(texts) if all(isinstance(text, str) for text in texts) else value
        if type(value) in (int, float) and abs(value) < math.inf:
            value = str(int(value)) if value == int(value) else repr(value)
        if _NO_TEXT.search(value) if isinstance(value, str) else value not in (None, []):
            wanted = "text without NUL and lone surrogates, or a finite number"
            raise field_error(where, name, wanted, value)
        if isinstance(value, str) and value.strip():
            return value
    wanted, fields = " / ".join(map(repr, names)), ", ".join(map(repr, record)) or "none"
    raise UserError(f"{where}: has no {wanted}; its fields are {fields}")


def field_error(where: str, name: str, wanted: str, value) -> UserError:
    return UserError(f"{where}: field {name!r}: expected {wanted}; got {reprlib.repr(value)}")
