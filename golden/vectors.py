"""The files of golden vectors: their form, their tensors, and when an answer equals the expected
one. Imports nothing of the project, so the runner needs only numpy and safetensors."""

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent
SCHEMA, VERSION = "rloop-golden", 1
STAGES = (
    *("losses", "random", "advantages", "filter", "evaluation", "sampling"),
    *("optimizer", "layers", "model", "text", "verdicts", "iteration"),
)
# the weights in the order in which a backward pass reaches them, within a layer and without one
BACKWARD = (
    *("lm_head", "model.norm", "mlp.down_proj", "mlp.up_proj", "mlp.gate_proj"),
    *("post_attention_layernorm", "o_proj", "v_proj", "k_norm", "k_proj", "q_norm", "q_proj"),
    *("input_layernorm", "embed_tokens"),
)
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def load_documents(folder: Path = FOLDER) -> list[dict]:
    """All files of vectors, in the order of their stages."""
    documents = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]
    return sorted(documents, key=lambda document: STAGES.index(document["stage"]))


def dump(document: dict) -> str:
    """A file of vectors as text: one case a line."""
    head = {key: value for key, value in document.items() if key != "cases"}
    lines = [json.dumps(case, ensure_ascii=False) for case in document["cases"]]
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    return text + ',\n "cases": [\n' + ",\n".join(lines) + "\n]}\n"


def resolve(value, bundles: dict | None = None):
    """The value with every {"bundle": FILE, "tensor": NAME} replaced by the tensor as lists, every
    {"bundle": FILE, "prefix": P} by an object of all tensors whose names begin with P, in the order
    of a backward pass, and every {"file": FILE} by the JSON of the file.

    bundles: file to tensors, by name; the files of the folder are read where it has none."""
    if isinstance(value, list):
        return [resolve(item, bundles) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"file"}:
        return json.loads((FOLDER / value["file"]).read_text("utf-8"))
    if "bundle" not in value:
        return {key: resolve(item, bundles) for key, item in value.items()}
    tensors = (bundles or {}).get(value["bundle"]) or bundle(value["bundle"])
    if "tensor" in value:
        return tensors[value["tensor"]].tolist()
    prefix = value["prefix"]
    names = [name.removeprefix(prefix) for name in sorted(tensors) if name.startswith(prefix)]
    names.sort(key=_backward_place)
    return {name: tensors[prefix + name].tolist() for name in names}


def _backward_place(name: str) -> tuple[int, int]:
    """Where a weight's gradient comes in a backward pass: the head first, the embedding last."""
    place = next((n for n, part in enumerate(BACKWARD) if part in name), len(BACKWARD))
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer is None:
        return (0 if place < 2 else 2), place
    return 1, place - len(BACKWARD) * int(layer[1])


@functools.cache
def bundle(name: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file."""
    return load_file(FOLDER / name)


def differences(expected, got, tolerance: dict[str, float], place: str = "") -> Iterator[str]:
    """One line for every place at which an answer differs from the expected one.

    A float may differ by abs + rel * |expected|; integers, texts and truth values not at all. Keys
    that are not expected do not matter.
    """
    where = place or "the answer"
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            yield f"{where}: expected an object, got {_short(got)}"
            return
        for key, item in expected.items():
            if key in got:
                yield from differences(item, got[key], tolerance, f"{place}.{key}".lstrip("."))
            else:
                yield f"{where}: has no {key!r}"
    elif isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            what = f"{len(got)} items" if isinstance(got, list) else _short(got)
            yield f"{where}: expected {len(expected)} items, got {what}"
            return
        for i, (item, other) in enumerate(zip(expected, got, strict=True)):
            yield from differences(item, other, tolerance, f"{place}[{i}]")
    elif not _equal(expected, got, tolerance):
        yield f"{where}: expected {_short(expected)}, got {_short(got)}"


def _equal(expected, got, tolerance: dict[str, float]) -> bool:
    is_number = isinstance(expected, float) or expected in NOT_FINITE
    if isinstance(expected, (bool, str)) and not is_number or expected is None:
        return type(got) is type(expected) and got == expected
    got = NOT_FINITE.get(got, got) if isinstance(got, str) else got
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return False
    if not is_number:
        return got == expected
    expected = NOT_FINITE.get(expected, expected)
    if not (math.isfinite(expected) and math.isfinite(got)):
        return got == expected or math.isnan(got) and math.isnan(expected)
    return abs(got - expected) <= tolerance["abs"] + tolerance["rel"] * abs(expected)


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
