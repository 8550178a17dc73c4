"""Records of .jsonl, .json, .csv and .parquet files, and the field names of public data sets."""

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from answers.extract import extract_boxed
from config import UserError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
QUESTIONS = ("problem", "question", "prompt", "Problem", "Question")
JUDGE = "reward_model.ground_truth"  # verl
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", JUDGE, "Answer")
IDS = ("id", "unique_id")

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
            record = json.loads(row) if isinstance(row, str) else row
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected an object, got {str(record)[:60]!r}")
            yield record, where
    except UserError:
        raise
    except (ValueError, csv.Error) as error:  # of json, the encoding, csv or pyarrow
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
            records = json.load(file)
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
    messages, context = record.get(name), []
    if isinstance(messages, list):
        pairs = [(m.get("role"), m.get("content")) for m in messages if isinstance(m, dict)]
        texts = [text for pair in pairs for text in pair if isinstance(text, str) and text]
        if len(texts) < 2 * len(messages) or pairs[-1][0] != "user":
            wanted = "messages of role and content, the last one the user's"
            raise UserError(f"{where}: field {name!r}: expected {wanted}")
        *context, (_, text) = pairs
    else:
        text = text_of(record, QUESTIONS, where)
    dapo = _DAPO.fullmatch(text)
    return dapo[1] if dapo else text, tuple(context)


def gold_answer(record: dict, where: str) -> tuple[str, float]:
    """The gold answer's text and its absolute tolerance.

    The text comes from reward_model.ground_truth (verl), else from an answer field, whose list is
    joined (OlympiadBench), else from the last \\boxed of the solution (MATH, Minerva). Only what
    follows `####` counts (GSM8K). The record's unit is added. Raises UserError.
    """
    if isinstance(record.get("reward_model"), dict):
        record = {JUDGE: record["reward_model"].get("ground_truth")}
    name = next((name for name in ANSWERS if record.get(name) not in (None, "", [])), None)
    if name is None and "solution" in record:
        text = extract_boxed(text_of(record, ("solution",), where))
        if text is None:
            raise UserError(f"{where}: has no 'answer', and its field 'solution' no \\boxed{{}}")
    elif isinstance(record.get(name), list):
        text = ", ".join(text_of({name: item}, (name,), where) for item in record[name])
    else:
        text = text_of(record, ANSWERS, where)
    text = text.rpartition("####")[2].strip()
    unit = record.get("unit")
    if isinstance(unit, str) and unit.strip() and "," not in text:
        text = f"{text.strip('$')} {unit.strip().strip('$')}"
    error = record.get("error")  # OlympiadBench: a number, or one for each of several answers
    try:
        return text, (min(map(float, str(error).split(","))) if error else 0.0)
    except ValueError:
        raise UserError(f"{where}: field 'error': expected a number, got {error!r}") from None


def text_of(record: dict, names: tuple[str, ...], where: str) -> str:
    """The first filled one of the named fields; a number becomes its shortest text (27.0: 27)."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if type(value) in (int, float) and abs(value) < math.inf:
            return str(int(value)) if value == int(value) else repr(value)
        if value not in (None, []) and not isinstance(value, str):
            raise UserError(f"{where}: field {name!r}: expected text, got {str(value)[:60]!r}")
    wanted, fields = " / ".join(map(repr, names)), ", ".join(map(repr, record)) or "none"
    raise UserError(f"{where}: has no {wanted}; its fields are {fields}")
