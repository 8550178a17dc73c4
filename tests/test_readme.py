"""README.md keeps pace with the code."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_function_links_point_at_their_functions():
    """Fault: a link that lands on another line after an edit."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 12
    for name, file, number in links:
        line = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {name}\b", line), f"{name}: {file}:{number} is {line!r}"


def test_pseudocode_names_exist():
    """Fault: the pseudocode names a function that is gone."""
    block = README.split("```")[1]
    named = [
        re.split(r"\s{2,}", line.strip())[1:] for line in block.splitlines() if line.endswith(".py")
    ]
    assert len(named) >= 10
    for functions, file in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in functions.split(", "):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), f"{name} in {file}"


def test_files_of_the_table_exist():
    """Fault: a file that was moved or renamed."""
    for path in re.findall(r"\]\(([\w./]+)(?:#L\d+)?\)", README):
        assert (ROOT / path).exists(), path
