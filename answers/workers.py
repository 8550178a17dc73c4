"""Worker processes for what may take any time or memory: killed at a deadline, limited in memory.

A process runs functions by import path, "module:function", one at a time; arguments and answers are
JSON over pipes. It finds the modules of this project, of PYTHONPATH and of the working directory.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

from config import UserError

MEMORY = 2 * 1024**3  # bytes of a worker's address space
START_S = 30.0  # to start a process and import what a function needs, besides its own time
_ROOT = Path(__file__).parents[1]
_PYTHONPATH = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


class _Worker:
    """A child process, and the pipes to it."""

    def __init__(self):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(_ROOT), *_PYTHONPATH]),
            "PYTHONHASHSEED": "0",  # some tasks of reasoning-gym depend on the order of sets
            "OMP_NUM_THREADS": "1",  # numpy takes 40 MB of address space for each thread
        }
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "answers.workers"],
            stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, env=environment,
        )  # fmt: skip
        self.owner = os.getpid()

    def ask(self, request: bytes, timeout_s: float) -> str | None:
        """The answer; None at the deadline, or "" if the process has died."""
        self.process.stdin.write(request + b"\n")
        line = self._line(START_S)
        return self._line(timeout_s) if line == "started\n" else line

    def _line(self, timeout_s: float) -> str | None:
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return None
        return self.process.stdout.readline().decode()  # the child writes whole lines

    def kill(self) -> None:
        with self.process:  # which closes the pipes
            self.process.kill()


_idle: list[_Worker] = []
_lock = threading.Lock()


def ask_worker(function: str, arguments: list, timeout_s: float, package: str):
    """What "module:function" answers; None when it does not answer in timeout_s, or dies.

    package: what is imported before the time counts, besides the module. Values that JSON lacks
    (dates, bytes) cross as text. Safe to call from threads. Raises UserError with the text of the
    exception that the import or the function raised.
    """
    request = json.dumps([package, function, arguments, timeout_s], default=str).encode()
    with _lock:
        while _idle and _idle[-1].owner != os.getpid():  # inherited through a fork: the parent's
            _idle.pop()
        worker = _idle.pop() if _idle else _Worker()
    try:
        line = worker.ask(request, timeout_s)
    except BrokenPipeError:  # it was out of memory, or killed from outside
        line = None
    if not line:
        worker.kill()
        worker = _Worker()  # starts in the background
    with _lock:
        _idle.append(worker)
    answer, error = json.loads(line) if line else (None, None)
    if error is not None:
        raise UserError(error)
    return answer


@atexit.register
def _stop_workers() -> None:
    with _lock:
        while _idle:
            worker = _idle.pop()
            if worker.owner == os.getpid():
                worker.kill()


def find_function(path: str):
    """The function at "module:function". Raises whatever its import raises."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _serve() -> None:
    """The worker process: a request of ask_worker in, "started" and [answer, error] out.

    Dies at the deadline even when nobody is left to kill it."""
    import resource
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's Ctrl-C reaches the children, too
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a function prints, or a program that it starts, is no answer
    sys.path.append(os.getcwd())  # the last: no file there stands for another module
    for line in sys.stdin:
        package, function, arguments, timeout_s = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, START_S + timeout_s + 1)
        try:
            run = find_function(function)
            import_module(package)
            print("started", file=answers, flush=True)
            reply = [run(*arguments), None]
        except MemoryError:  # it ends the process, as the other limits do
            raise
        except (Exception, SystemExit) as error:
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reply = [None, f"{name}{error}"]
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
