"""Writes the vectors again: python -m golden.make

The expected answers are the reference's, in float64, written as the shortest decimals that give the
same float32 (or float64, where a file says so). Large arrays go into the model's bundle.
"""

import json
import os

import numpy as np
from safetensors.numpy import save

from golden import cases, model_cases, reference, text_cases, verdict_cases
from golden.flags import FLAGS
from golden.vectors import FOLDER, SCHEMA, VERSION, dump, resolve

INLINE = 64  # an array of more numbers goes into the bundle


def documents() -> list[dict]:
    """All files, without expected answers."""
    modules = cases, model_cases, text_cases, verdict_cases
    return [document for module in modules for document in module.documents()]


def complete(document: dict, bundles: dict[str, dict]) -> dict:
    """The file of a document: with its expected answers, and what its flags mean. Large arrays are
    added to the bundles."""
    rows = []
    for case in document["cases"]:
        request = {"function": document["function"], "inputs": resolve(case["inputs"], bundles)}
        output = reference.answer(request)
        if "config" in case["inputs"]:
            file = case["inputs"]["weights"]["bundle"]
            place = f"{document['function']}.{case['id']}"
            output = outsourced(output, place, file, bundles[file])
        output = shortest(output) if document["dtype"] == "float32" else output
        rows.append(case | {"expected": output})
    flags = dict.fromkeys(flag for case in rows for flag in case["flags"])
    head = {"schema": SCHEMA, "version": VERSION} | document
    return head | {"flags": {flag: FLAGS[flag] for flag in flags}, "cases": rows}


def outsourced(value, place: str, file: str, tensors: dict[str, np.ndarray]):
    """The value with what is large moved to the tensors of a bundle, under the name place."""
    if isinstance(value, dict) and any(name.endswith(".weight") for name in value):
        for name, array in value.items():
            tensors[f"{place}.{name}"] = np.array(array, dtype=np.float32)
        return {"bundle": file, "prefix": f"{place}."}
    if isinstance(value, dict):
        return {
            key: outsourced(item, f"{place}.{key}", file, tensors) for key, item in value.items()
        }
    if not isinstance(value, list):
        return value
    if is_array(value) and np.size(value) > INLINE:
        tensors[place] = np.array(value, dtype=np.float32)
        return {"bundle": file, "tensor": place}
    return [outsourced(item, f"{place}.{n}", file, tensors) for n, item in enumerate(value)]


def is_array(value) -> bool:
    """Whether a list is a rectangular array of floats."""
    try:
        return np.array(value).dtype.kind == "f"
    except ValueError:  # lists of different lengths
        return False


def shortest(value):
    """Floats as the shortest decimals of their float32."""
    if isinstance(value, list):
        return [shortest(item) for item in value]
    if isinstance(value, dict):
        return {key: shortest(item) for key, item in value.items()}
    return float(str(np.float32(value))) if isinstance(value, float) else value


def write(name: str, content: bytes) -> None:
    temporary = FOLDER / f"{name}.tmp"
    temporary.write_bytes(content)
    os.replace(temporary, FOLDER / name)


def main() -> None:
    (FOLDER / "tokenizer").mkdir(exist_ok=True)
    write("tokenizer/tokenizer.json", json.dumps(text_cases.tokenizer(), indent=0).encode())
    bundles = model_cases.bundles()
    for document in documents():
        text = dump(complete(document, bundles))
        write(f"{document['function']}.json", text.encode())
    for name, tensors in bundles.items():
        write(name, save(tensors))


if __name__ == "__main__":
    main()
