"""Processes of this machine, as an executor: `submit(function, *arguments)` returns a future.

Unlike the standard library's they don't import the script that started them, which so needs no `if __name__ ==
"__main__"`; one that dies costs what it was doing and nothing else, and that is tried once more; and all end at once
when the process that started them is interrupted, or gone.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Self

_START = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from annealed_core.running import workers; "


class WorkerDied(RuntimeError):
    """A process died twice of what it was given."""


class Workers:
    """At most so many processes, each started when it is first needed; leaving the context ends them.

    Functions, arguments and results travel as the standard pickles do.
    """

    def __init__(self, number: int) -> None:
        self._threads = ThreadPoolExecutor(number)  # each waits for one process
        self._own = threading.local()
        self._started: list[subprocess.Popen[bytes]] = []
        self._closing = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Let a process call the function."""
        return self._threads.submit(self._ask, pickle.dumps((function, arguments)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        for process in self._started:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._started:
            with suppress(OSError), process:  # closes its pipes and waits for its end
                pass

    def _ask(self, message: bytes) -> Any:
        for last in (False, True):
            process = self._process()
            assert process.stdin and process.stdout
            try:
                pickle.dump(message, process.stdin)
                process.stdin.flush()
                answer = pickle.load(process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError):
                self._own.process = None
                if not (last or self._closing):
                    status = f"process {process.pid} died with status {process.wait()}"
                    logging.getLogger(__name__).warning(f"{status}: what it was doing is begun again by another")
                continue
            succeeded, value = pickle.loads(answer)
            if succeeded:
                return value
            raise value
        raise WorkerDied(f"its process died twice, with status {process.wait()}: for want of memory perhaps")

    def _process(self) -> subprocess.Popen[bytes]:
        """The process of this thread."""
        if getattr(self._own, "process", None) is None:
            path = os.pathsep.join(each or os.getcwd() for each in sys.path)
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ANNEALED_PROGRESS": "0"}
            command = [sys.executable, "-c", _START + "workers.work()"]
            pipe = subprocess.PIPE
            self._own.process = process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
            self._started.append(process)
            if self._closing:
                process.kill()
        found: subprocess.Popen[bytes] = self._own.process
        return found


def work() -> None:
    """What such a process does, until its parent is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here goes to stderr
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                asked.put(pickle.load(sys.stdin.buffer))
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        message = asked.get()
        try:
            function, arguments = pickle.loads(message)
            answer = pickle.dumps((True, function(*arguments)))
        except Exception as error:
            answer = _failed(error)
        pickle.dump(answer, answers)
        answers.flush()


def _failed(error: Exception) -> bytes:
    return pickle.dumps((False, portable(error)))


def portable(error: Exception) -> Exception:
    """An error as it can travel, with a note of where it came from."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # not every error can be pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
