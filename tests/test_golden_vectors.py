"""The golden vectors for ports: they agree with the code, and the runner tells right from wrong."""

import pytest

from golden import flags, make
from golden.vectors import FOLDER, differences, dump, load_documents

STORED = {document["function"]: document for document in load_documents()}


@pytest.mark.parametrize("document", make.documents(), ids=lambda document: document["function"])
def test_code_and_vectors_agree(document):
    """Fault: a product function, or a case, was changed and the vectors were not made again."""
    stored = STORED[document["function"]]
    file = FOLDER / f"{document['function']}.json"
    assert file.read_text("utf-8") == dump(stored)
    made = make.complete(document)
    for now, then in zip(made["cases"], stored["cases"], strict=True):
        expected, got = then.pop("expected"), now.pop("expected")
        assert now == then
        assert not list(differences(expected, got, stored["tolerance"])), now["id"]
    assert made | {"cases": []} == stored | {"cases": []}


def test_every_file_is_made():
    """Fault: the vectors of a function that is gone stay behind, and ports are held to them."""
    assert {document["function"] for document in make.documents()} == STORED.keys()
    used = {case["flag"] for document in make.documents() for case in document["cases"]}
    assert used == flags.FLAGS.keys()
