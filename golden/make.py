"""Writes the vectors again: python -m golden.make

The expected answers are the reference's, in float64, written as the shortest decimals that give the
same float32 (or float64, where a file says so).
"""

import numpy as np

from golden import cases, reference
from golden.flags import FLAGS
from golden.vectors import FOLDER, SCHEMA, VERSION, dump, resolve


def documents() -> list[dict]:
    """All files, without expected answers."""
    return cases.documents()


def complete(document: dict) -> dict:
    """The file of a document: with its expected answers, and what its flags mean."""
    rows = [case | {"expected": expected(document, case)} for case in document["cases"]]
    flags = dict.fromkeys(case["flag"] for case in rows)
    head = {"schema": SCHEMA, "version": VERSION} | document
    return head | {"flags": {flag: FLAGS[flag] for flag in flags}, "cases": rows}


def expected(document: dict, case: dict):
    """The reference's answer to a case, as the file writes it."""
    request = {"function": document["function"], "inputs": resolve(case["inputs"])}
    output = reference.answer(request)
    return shortest(output) if document["dtype"] == "float32" else output


def shortest(value):
    """Floats as the shortest decimals of their float32."""
    if isinstance(value, list):
        return [shortest(item) for item in value]
    if isinstance(value, dict):
        return {key: shortest(item) for key, item in value.items()}
    return float(str(np.float32(value))) if isinstance(value, float) else value


def main() -> None:
    for document in documents():
        file = FOLDER / f"{document['function']}.json"
        file.write_text(dump(complete(document)), encoding="utf-8")


if __name__ == "__main__":
    main()
