"""README.md and the pages of docs/ keep pace with the code."""

import ast
import dataclasses
import re
import shlex

import pytest
from conftest import ROOT

import talk
from config import Config, load_config

README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]
MAX_README_LINES = 220
MAX_SIZE_ERROR = 0.05
SECTIONS = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
PLAN_OPTIONS = {"--plan": 1, "--gpus": 2, "--gpu-memory-gb": 2}  # words of each


def text_of(page) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def section_of(text: str, title: str) -> str:
    """The text under a heading of the second level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.M)[1]


def num_lines(path) -> int:
    """Lines of a file, or of all Python files in a directory."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return sum(len(text_of(file).splitlines()) for file in files)


def functions_of(path, imported: bool = False) -> set[str]:
    """Names of a file's functions, classes and methods ("Class.method"), or also of its imports."""
    names = set()
    for node in ast.parse(text_of(path)).body:
        if imported and isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {
                f"{node.name}.{child.name}"
                for child in node.body
                if isinstance(node, ast.ClassDef) and isinstance(child, ast.FunctionDef)
            }
    return names


def expand(block: str) -> list[str]:
    """The commands of a shell block: of a loop, the first value of its variable."""
    values = {}
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        loop = re.match(r"\s*for (\w+) in (\S+)", line)
        if loop:
            values[loop[1]] = loop[2].rstrip(";")
            continue
        for command in line.split("&&"):
            commands.append(re.sub(r"\$(\w+)", lambda m: values.get(m[1], m[0]), command).strip())
    return commands


def commands_of(page) -> list[list[str]]:
    """The arguments of every `python` and `torchrun` command, from the script or the `-m` on."""
    text = text_of(page)
    candidates = [command for block in code_blocks(text) for command in expand(block)]
    candidates += re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)
    commands = []
    for command in candidates:
        words = shlex.split(command, comments=True) if "python" in command.split() else []
        if words[:1] == ["python"]:
            commands.append(words[1:])
        elif command.startswith("torchrun "):
            words = shlex.split(command, comments=True)
            commands.append(words[words.index("rloop.py") :])
    return commands


def check_command(arguments: list[str]) -> None:
    """Raises AssertionError for a missing file or option, UserError for a refused config."""
    if arguments[:2] == ["-m", "ports.trl_rloop"]:
        arguments = ["rloop.py", *arguments[2:]]  # takes the same options
    script, rest = arguments[0], arguments[1:]
    if script == "-m":
        module = ROOT / f"{rest[0].replace('.', '/')}.py"
        if rest[0] == "pytest":
            for word in rest[1:]:
                assert word.startswith("-") or (ROOT / word).exists(), word
            return
        assert module.is_file(), module
        known = text_of(module) + text_of(ROOT / "bench" / "common.py")
        for option in rest[1:]:
            assert not option.startswith("--") or f'"{option}"' in known, f"{rest[0]}: {option}"
        return
    assert (ROOT / script).is_file(), script
    if script == "rloop.py" and "--sample" in rest:
        talk.read_options(rest)
    elif script == "rloop.py":
        while extra := next((word for word in rest if word in PLAN_OPTIONS), None):
            at = rest.index(extra)
            del rest[at : at + PLAN_OPTIONS[extra]]
        assert rest[0] == "--config", rest
        load_config(ROOT / rest[1], rest[2:])


def test_readme_is_short():
    """Fault: measurements and details go into the README instead of a page of docs/."""
    assert len(text_of(README).splitlines()) <= MAX_README_LINES


def test_sizes_are_those_of_the_files():
    """Fault: the promised sizes stay while the files grow, or a file is not in the table."""
    rows = re.findall(r"^\| \[[^]]+\]\(([\w./]+)\) \| ([\d,]+) \|", text_of(README), re.MULTILINE)
    stated = {path.rstrip("/"): int(size.replace(",", "")) for path, size in rows}
    counted = {path: num_lines(ROOT / path) for path in stated}
    wrong = [
        f"{path}: stated {size}, counted {counted[path]}"
        for path, size in stated.items()
        if abs(size - counted[path]) > MAX_SIZE_ERROR * counted[path]
    ]
    assert not wrong, "\n".join(wrong)
    assert {path.name for path in ROOT.glob("*.py")} <= stated.keys()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "log.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    """Fault: a file that was moved or renamed; a link to a line, which the next edit moves."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_tree_names_files():
    """Fault: the tree of files names one that is gone."""
    paths = [
        line.split()[0]
        for line in code_blocks(section_of(text_of(README), "Files"))[0].splitlines()
    ]
    assert len(paths) >= 10
    for path in paths:
        assert list(ROOT.glob(path)), path


def test_pseudocode_names_functions():
    """Fault: the pseudo-code names a function that is gone or lives in another file."""
    lines = code_blocks(section_of(text_of(README), "The algorithm"))[0].splitlines()
    named = [re.split(r"\s{2,}", line.strip())[1:] for line in lines if line.endswith(".py")]
    assert len(named) >= 10
    for functions, file in named:
        assert set(functions.split(", ")) <= functions_of(ROOT / file), f"{functions} in {file}"


def test_tables_name_functions():
    """Fault: "To change X, edit Y" or the list for ports names a function that is gone."""
    known = {name for path in ROOT.glob("*.py") for name in functions_of(path, imported=True)}
    edits = re.findall(r"`(\w+)`", section_of(text_of(README), "To change X, edit Y"))
    assert len(edits) >= 8
    assert set(edits) <= known, set(edits) - known
    rows = re.findall(r"^\| (`.+?) \| (\w+\.py) \|", text_of(ROOT / "docs" / "porting.md"), re.M)
    assert len(rows) >= 8
    for names, file in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert name in functions_of(ROOT / file, imported=True), f"{name} in {file}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page):
    """Fault: a page names a config key that is gone or misspelt."""
    for section, name in re.findall(r"`(?:--)?([a-z]+)\.(\w+)[^`/]*`", text_of(page)):
        if section in SECTIONS and name != "py":
            keys = {f.name for f in dataclasses.fields(SECTIONS[section])}
            assert name in keys, f"{section}.{name}"


def test_commands_can_be_run():
    """Fault: a command names a script, module, config file, option or key that is gone."""
    commands = [(page, arguments) for page in PAGES for arguments in commands_of(page)]
    assert len(commands) >= 30
    for page, arguments in commands:
        try:
            check_command(arguments)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"{page.name}: python {shlex.join(arguments)}: {error}") from error
