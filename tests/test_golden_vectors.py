"""The golden vectors for ports: they agree with the code, and the runner tells right from wrong."""

import numpy as np
import torch

from golden import flags, make, model_cases, reference
from golden.mutants import failing
from golden.vectors import FOLDER, bundle, differences, dump, load_documents, resolve

STORED = {document["function"]: document for document in load_documents()}


def test_code_and_vectors_agree():
    """Fault: a product function, or a case, was changed and the vectors were not made again."""
    bundles = model_cases.bundles()
    for document in make.documents():
        stored = STORED[document["function"]]
        file = FOLDER / f"{document['function']}.json"
        assert file.read_text("utf-8") == dump(stored)
        made = make.complete(document, bundles)
        assert made | {"cases": []} == stored | {"cases": []}
        for now, then in zip(made["cases"], stored["cases"], strict=True):
            assert now | {"expected": 0} == then | {"expected": 0}
            got, expected = resolve(now["expected"], bundles), resolve(then["expected"])
            assert not list(differences(expected, got, stored["tolerance"])), now["id"]
    for name, tensors in bundles.items():
        assert tensors.keys() == bundle(name).keys()
        assert all(np.allclose(t, bundle(name)[key], 1e-4, 1e-5) for key, t in tensors.items())


def test_every_file_is_made():
    """Fault: the vectors of a function that is gone stay behind, and ports are held to them."""
    assert {document["function"] for document in make.documents()} == STORED.keys()
    used = {flag for document in STORED.values() for flag in document["flags"]}
    assert used == flags.FLAGS.keys()


def test_float32_passes(monkeypatch):
    """Fault: a tolerance that no port in float32 can meet."""
    monkeypatch.setattr(reference, "DTYPE", torch.float32)
    assert not failing(list(STORED.values()))
