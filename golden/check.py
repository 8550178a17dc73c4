"""Checks a port against the golden vectors.

    python -m golden.check [-only PATTERN] [-skip PATTERN] [-deadline SECONDS] COMMAND ...

The command is started once. It reads requests from its standard input, one JSON object a line, and
answers each with one JSON object a line before it reads the next; golden/README.md has the details.
A pattern is matched with STAGE/FUNCTION/ID of a case or a beginning of it: "losses",
"losses/grpo_loss", "*/*/flat*". Exit status 1 if anything failed.
"""

import argparse
import fnmatch
import json
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from golden.vectors import STAGES, differences, load_documents, resolve

START_S = 120.0  # a port may take this long to answer its first request
MAX_SILENT = 5  # cases in a row without an answer, behind which the port is given up
MAX_SHOWN = 40  # failures that are listed


class Failed(Exception):
    """The port gave no answer; the text says why."""


@dataclass
class Result:
    """What became of a case. detail: the first difference, or why it was skipped."""

    path: str  # STAGE/FUNCTION/ID
    stage: str
    outcome: str  # "passed" | "failed" | "skipped"
    detail: str = ""
    hints: list[str] = field(default_factory=list)  # of a wrong answer: the flags, what they mean


class Port:
    """The command, started again whenever it has ended."""

    def __init__(self, command: list[str], deadline_s: float):
        self.command, self.deadline_s = command, deadline_s
        self.process = None
        self.num_silent = 0  # requests in a row that had no answer

    def ask(self, request: dict) -> dict:
        """The port's answer to a request. Raises Failed."""
        if self.num_silent >= MAX_SILENT:
            raise Failed(f"not asked: {MAX_SILENT} cases in a row had no answer")
        self.num_silent += 1
        deadline_s = self.deadline_s
        if self.process is None or self.process.poll() is not None:
            deadline_s = max(START_S, deadline_s)
            self.start()
        answers = queue.SimpleQueue()
        thread = threading.Thread(target=self._exchange, args=(request, answers), daemon=True)
        thread.start()
        try:
            line = answers.get(timeout=deadline_s)
        except queue.Empty:
            self.stop()
            raise Failed(f"no answer within {deadline_s:g} s") from None
        if not line.endswith("\n"):
            self.stop(grace_s=1.0)
            raise Failed(f"ended without an answer, exit status {self.process.returncode}")
        self.num_silent = 0
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            self.stop()  # what else it wrote would be read as the next answers
            raise Failed(f"not JSON: {line.strip()[:60]!r}") from None
        if not (isinstance(reply, dict) and {"output", "skip", "error"} & reply.keys()):
            raise Failed(f'expected {{"output": ...}} or {{"skip": ...}}, got {line.strip()[:60]}')
        if "error" in reply:
            raise Failed(f"error: {reply['error']}")
        return reply

    def _exchange(self, request: dict, answers: queue.SimpleQueue) -> None:
        process = self.process
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answers.put(process.stdout.readline())
        except (OSError, ValueError):  # it has ended, or wrote bytes that are no UTF-8
            answers.put("")

    def start(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(self.command, **pipes, encoding="utf-8")

    def stop(self, grace_s: float = 0.0) -> None:
        """End the process, which may end by itself within grace_s."""
        if self.process is None:
            return
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run(port: Port, documents: list[dict], only: list[str], skip: list[str]) -> Iterator[Result]:
    """The results of all chosen cases, one by one."""
    for document in documents:
        for case in document["cases"]:
            path = f"{document['stage']}/{document['function']}/{case['id']}"
            if (not only or _matches(path, only)) and not _matches(path, skip):
                yield Result(path, document["stage"], *_outcome(port, document, case))


def _outcome(port: Port, document: dict, case: dict) -> tuple:
    """Outcome, detail and hints of a case."""
    request = {"function": document["function"], "id": case["id"]}
    try:
        reply = port.ask(request | {"inputs": resolve(case["inputs"])})
    except Failed as failure:
        return "failed", str(failure)
    if "skip" in reply:
        return "skipped", str(reply["skip"])
    difference = next(judge(document, case, reply["output"]), None)
    if difference is None:
        return ("passed",)
    hints = [f"{flag}: {document['flags'][flag]}" for flag in case["flags"]]
    return "failed", difference, hints


def judge(document: dict, case: dict, output) -> Iterator[str]:
    """One line for each difference between the expected output of a case and this one."""
    return differences(resolve(case["expected"]), output, document["tolerance"])


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(path, f"{p}/*") for p in patterns)


def table(results: list[Result]) -> str:
    """Passed, failed and skipped by stage; why cases were skipped; then the failures, and what each
    suggests."""
    counts = {outcome: Counter() for outcome in ("passed", "failed", "skipped")}
    for result in results:
        counts[result.outcome][result.stage] += 1
    lines = [f"{'stage':12} {'passed':>8} {'failed':>8} {'skipped':>8}"]
    for stage in (*STAGES, "all"):
        numbers = [c.total() if stage == "all" else c[stage] for c in counts.values()]
        if sum(numbers):
            lines.append(f"{stage:12} " + " ".join(f"{number:8}" for number in numbers))
    functions = Counter(
        (result.path.split("/")[1], result.detail)
        for result in results
        if result.outcome == "skipped"
    )
    for (function, reason), number in functions.items():
        lines.append(f"skipped: {function} ({number}): {reason}")
    failures = [result for result in results if result.outcome == "failed"]
    for result in failures[:MAX_SHOWN]:
        lines += ["", f"FAILED {result.path}: {result.detail}"]
        lines += [f"    {hint}" for hint in result.hints]
    if len(failures) > MAX_SHOWN:
        lines += ["", f"and {len(failures) - MAX_SHOWN} more failures"]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="golden.check", description=__doc__.partition("\n")[0])
    parser.add_argument("-only", action="append", default=[], metavar="PATTERN")
    parser.add_argument("-skip", action="append", default=[], metavar="PATTERN")
    parser.add_argument("-deadline", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("which command starts the port?")
    port = Port(options.command, options.deadline)
    try:
        results = list(run(port, load_documents(), options.only, options.skip))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        port.stop()
    print(table(results))
    return int(not results or any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
