"""Records of .jsonl, .json, .csv and .parquet files, and what the public data sets call their fields."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from answers.equality import check_gold
from answers.extract import extract_boxed

QUESTION_FIELDS = ("problem", "question", "prompt", "Problem", "Question")
ANSWER_FIELDS = (
    "answer",
    "final_answer",
    "expected_answer",
    "ground_truth",
    "reward_model.ground_truth",
    "Answer",
)
ID_FIELDS = ("id", "unique_id")
EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")

# DAPO-Math-17k and its AIME-2024 carry their prompt template in every question; ours is data.prompt
_DAPO_HEAD = re.compile(
    r"\s*Solve the following math problem step by step\. The last line of your response should be of the form Answer:.*\n\s*"
)
_DAPO_TAIL = re.compile(r'\s*Remember to put your answer on its own line after "Answer:"\.\s*$')


def read_records(path: str) -> Iterator[tuple[dict, str]]:
    """Records of a file with their place, such as "data/x.jsonl:17". Raises ValueError that names file and place."""
    if not path.endswith(EXTENSIONS):
        raise ValueError(
            f"data source {path!r}: expected countdown:SPLIT, reasoning_gym:TASK or a file ending in {', '.join(EXTENSIONS)}"
        )
    if not Path(path).is_file():
        raise ValueError(f"data source {path}: not found")
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    record = None
    try:
        for record, where in readers[Path(path).suffix](path):
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected an object, got {str(record)[:60]!r}")
            yield record, where
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if record is None:
        raise ValueError(f"data source {path}: holds no records")


def _read_jsonl(path: str) -> Iterator[tuple[dict, str]]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line), f"{path}:{number}"
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None


def _read_json(path: str) -> Iterator[tuple[dict, str]]:
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected an array of records, got {type(records).__name__}")
    for index, record in enumerate(records):
        yield record, f"{path}[{index}]"


def _read_csv(path: str) -> Iterator[tuple[dict, str]]:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise ValueError(f"{where}: has another number of fields than the header line")
            yield record, where


def _read_parquet(path: str) -> Iterator[tuple[dict, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        row = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=10_000):
            for record in batch.to_pylist():
                row += 1
                yield record, f"{path} row {row}"
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from None


# ---- fields


class UnreadableGold(ValueError):
    """A gold answer that cannot be read as an answer: nothing could ever be right."""


def question(record: dict, where: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The question's text, and the (role, content) messages before it if it is a list of messages (verl)."""
    name = next((name for name in QUESTION_FIELDS if record.get(name)), None)
    if not isinstance(record.get(name), list):
        text, context = text_of(record, QUESTION_FIELDS, where), ()
    else:
        try:
            messages = [(message["role"], message["content"]) for message in record[name]]
        except (TypeError, KeyError):
            messages = []
        if (
            not messages
            or messages[-1][0] != "user"
            or not all(isinstance(content, str) and content for _, content in messages)
        ):
            raise ValueError(
                f"{where}: field {name!r}: expected messages of role and content, the last one the user's"
            )
        text, context = messages[-1][1], tuple(messages[:-1])
    head = _DAPO_HEAD.match(text)
    return (_DAPO_TAIL.sub("", text[head.end() :]) if head else text), context


def gold_answer(record: dict, where: str) -> tuple[str, float]:
    """The gold answer's text and its absolute tolerance.

    From reward_model.ground_truth (verl); or an answer field: what stands behind `####` (GSM8K), or a list, with the record's unit
    (OlympiadBench); or else the last \\boxed of the solution (MATH, Minerva). Raises ValueError, of which UnreadableGold is one.
    """
    judge = record.get("reward_model")
    if isinstance(judge, dict):
        record = {"reward_model.ground_truth": judge.get("ground_truth")}
    name = next((name for name in ANSWER_FIELDS if record.get(name) not in (None, "", [])), None)
    if name is None and "solution" in record:
        name, text = "solution", extract_boxed(text_of(record, ("solution",), where))
        if text is None:
            raise ValueError(f"{where}: has no 'answer', and its field 'solution' no \\boxed{{}}")
    elif isinstance(record.get(name), list):
        text = ", ".join(text_of({name: item}, (name,), where) for item in record[name])
    else:
        text = text_of(record, ANSWER_FIELDS, where)
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    unit = record.get("unit")
    if isinstance(unit, str) and unit.strip() and "," not in text:
        text = f"{text.strip().strip('$')} {unit.strip().strip('$')}"
    try:
        check_gold(text)
    except ValueError as error:
        raise UnreadableGold(f"{where}: field {name!r}: {error}") from None
    return text, _tolerance(record.get("error"), where)


def _tolerance(error, where: str) -> float:
    """OlympiadBench's field: empty, or one number, or one for each of several answers, of which the strictest counts."""
    try:
        return min((float(part) for part in str(error).split(",")), default=0.0) if error else 0.0
    except ValueError:
        raise ValueError(f"{where}: field 'error': expected a number, got {error!r}") from None


def text_of(record: dict, names: tuple[str, ...], where: str) -> str:
    """The first of the named fields that is filled; a number becomes its shortest text (27.0 is 27)."""
    for name in names:
        value = record.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(int(value)) if value == int(value) else repr(value)
        if isinstance(value, str) and value.strip():
            return value
        if value not in (None, "", []) and not isinstance(value, str):
            raise ValueError(f"{where}: field {name!r}: expected text, got {str(value)[:60]!r}")
    raise ValueError(
        f"{where}: has no {' / '.join(map(repr, names))}; its fields are {', '.join(map(repr, record)) or 'none'}"
    )
