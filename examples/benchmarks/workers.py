"""One contender in a process of its own.

What a contender sets for its process and how its memory is laid out then concern no other one, and
the peak of its memory is its own.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import current_thread, main_thread
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from contenders import ContenderError, classifier, made
from fcvgg.choices import Clock
from fcvgg.errors import FcvggError, one_line
from fcvgg.optimization.timing import Timer
from machine import peak_bytes

_PATIENCE = 2.0
"""Seconds in which a process that nobody asks any more ends by itself."""


@dataclass(frozen=True)
class Case:
    """What every contender is measured on.

    Attributes:
        model: a torchvision name.
        size: side of the square images.
        batch: images per call.
        threads: of every contender.
        clock: the time that is counted.
    """

    model: str
    size: int
    batch: int
    threads: int
    clock: Clock = "wall"

    def __str__(self) -> str:
        return f"{self.size}x{self.size}, batch {self.batch}"

    def images(self) -> Tensor:
        """Float32 noise ``(batch, 3, size, size)``, the same for every contender."""
        noise = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.size, self.size, generator=noise)


class Runner(Timer):
    """A contender that is made for a case and called on its images.

    Raises:
        FcvggError: if the contender cannot run this model, or needs a package that is absent.
    """

    def __init__(self, contender: str, case: Case) -> None:
        torch.set_num_threads(case.threads)
        self._run = made(contender, *classifier(case.model), case.size)
        self._images = case.images()
        super().__init__(lambda: self._run(self._images), case.clock)

    def scores(self) -> NDArray[Any]:
        """The score map ``(N, K, h, w)``, of a comparable contender."""
        with torch.no_grad():
            scores = self._run(self._images)
        return scores.float().numpy()

    def memory(self) -> int | None:
        """Bytes that this process has held at most, or None."""
        return peak_bytes()


class Worker:
    """A `Runner` in a new process; a context manager that ends the process.

    The process is started afresh (``spawn``), so a script that comes here needs the usual
    ``if __name__ == "__main__":``.

    Raises:
        FcvggError: what `Runner` raises.
        ContenderError: if the process ends or anything else goes wrong in it; of all methods.
    """

    def __init__(self, contender: str, case: Case) -> None:
        context = get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, contender, case), daemon=True)
        with _interrupts_ignored():  # for good in the process, which the parent ends
            self._process.start()
        end.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self) -> float:
        """As of `Runner`."""
        return self._ask("call")

    def turn(self) -> list[float]:
        """As of `Runner`."""
        return self._ask("turn")

    def scores(self) -> NDArray[Any]:
        """As of `Runner`."""
        return self._ask("scores")

    def memory(self) -> int | None:
        """As of `Runner`."""
        return self._ask("memory")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._pipe.close()
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()

    def _ask(self, method: str) -> Any:
        with suppress(OSError):  # the answer tells that the process is gone
            self._pipe.send(method)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(_PATIENCE)
            code = self._process.exitcode
            killed = "was killed, most likely for want of memory"
            why = killed if code == -9 else f"ended with {code}"
            raise ContenderError(f"its process {why}") from error
        if isinstance(answer, FcvggError):
            raise answer
        return answer


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if current_thread() is not main_thread():  # which alone may set it
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection, contender: str, case: Case) -> None:
    """What the process does: make the runner, then call the methods that it is sent."""
    with suppress(EOFError, OSError):  # until the parent asks no more
        try:
            runner = Runner(contender, case)
        except FcvggError as error:
            pipe.send(FcvggError(one_line(error)))
        except Exception as error:
            pipe.send(_failure(error))
        else:
            pipe.send(None)
            while True:
                pipe.send(_result(getattr(runner, pipe.recv())))


def _result(method: Callable[[], Any]) -> Any:
    try:
        return method()
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> ContenderError:
    """In one line; the rest is printed here, since a traceback does not pass the pipe."""
    traceback.print_exc()
    return ContenderError(f"{type(error).__name__}: {one_line(error)}")
