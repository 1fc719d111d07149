"""Batches on this machine: in this process, or in several that each load the model once."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from lic import work
from lic.batch import Job
from lic.errors import LicError
from lic.outcome import Failure, Outcome, failure_of, log
from lic.work import Operation

if TYPE_CHECKING:
    from lic.api import Codec

Done = Callable[[Outcome], None]

_STOP_SECONDS = 10  # for a worker to finish the file that it is writing


def run(operation: Operation, jobs: Sequence[Job], processes: int, done: Done) -> None:
    """Do all jobs and call ``done`` for each, from any thread.

    Raises LicError when no job could succeed (model, device), and what ``done`` raises. When anything is raised,
    KeyboardInterrupt included, no output is left half written and no worker runs.
    """
    processes = min(processes, len(jobs))
    if processes == 1:
        codec = operation.codec()
        log.info("running on %s", codec.device)
        pipeline(operation, codec, jobs, done)
    else:
        _Workers(replace(operation, threads=operation.threads or _fair_threads(processes)), jobs, processes, done).run()


def pipeline(operation: Operation, codec: Codec, jobs: Iterable[Job], done: Done) -> None:
    """Do ``jobs``, whose iterator may block: the next are read and the last are written while one is coded."""
    # On a CPU the networks keep all cores busy, and a few pictures ahead are enough; a CUDA device is faster
    # than one core writes PNG.
    depth = 2 if codec.device == "cpu" else 8
    room = threading.Semaphore(depth)
    loaded: SimpleQueue[tuple[Job, Future[tuple[Any, int]]] | None] = SimpleQueue()
    saving: deque[Future[None]] = deque()
    readers, writers = ThreadPoolExecutor(depth, "reader"), ThreadPoolExecutor(depth, "writer")
    stopped = threading.Event()

    def feed() -> None:
        for job in jobs:
            room.acquire()
            if stopped.is_set():
                return
            loaded.put((job, readers.submit(work.load, operation, job)))
        loaded.put(None)

    def code(job: Job, reading: Future[tuple[Any, int]]) -> None:
        try:
            picture, size = reading.result()
            result = operation.code(codec, picture)
        except Exception as error:
            done(Outcome(job, failure=failure_of(error, job.source)))
        else:
            saving.append(writers.submit(save, job, picture, size, result))

    def save(job: Job, picture: Any, size: int, result: Any) -> None:
        try:
            outcome = Outcome(job, work.save(operation, job, picture, size, result, codec.device))
        except Exception as error:
            outcome = Outcome(job, failure=failure_of(error, job.source))
        done(outcome)

    feeder = threading.Thread(target=feed, name="feeder", daemon=True)
    feeder.start()
    try:
        while (item := loaded.get()) is not None:
            code(*item)
            room.release()
            while len(saving) > depth or (saving and saving[0].done()):
                saving.popleft().result()
        for future in saving:
            future.result()
    finally:
        stopped.set()
        room.release()
        readers.shutdown(wait=False, cancel_futures=True)
        writers.shutdown(wait=True, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------
# several processes


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    jobs: list[Job] = field(default_factory=list)  # sent and not yet answered


class _Workers:
    """The parent's side. Messages from a worker: ready, failed (to start), log, done."""

    _WINDOW = 3  # jobs that a worker has: one is coded, the next are read

    def __init__(self, operation: Operation, jobs: Sequence[Job], processes: int, done: Done) -> None:
        self._operation, self._waiting, self._done = operation, deque(jobs), done
        # A fresh interpreter: torch's threads do not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._suspects: set[Job] = set()  # those that a worker had when it died; each is then done alone
        self._processes = processes

    def run(self) -> None:
        try:
            for _ in range(self._processes):
                self._start()
            while self._workers:
                for connection in wait([worker.connection for worker in self._workers]):
                    worker = next(worker for worker in self._workers if worker.connection is connection)
                    try:
                        kind, value = worker.connection.recv()
                    except (EOFError, ConnectionError):
                        self._ended(worker)
                    else:
                        self._hear(worker, kind, value)
        finally:
            self._stop()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._operation, log.level)
        process = self._context.Process(target=_worker, args=arguments, name="lic worker", daemon=True)
        with _blocked_interrupts():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))

    def _hear(self, worker: _Worker, kind: str, value: Any) -> None:
        if kind == "log":
            log.handle(value)
        elif kind == "failed":
            raise LicError(value.line)
        elif kind == "ready":
            worker.ready = True
            log.info("a worker runs on %s", value)
        else:
            worker.jobs.remove(value.job)
            self._done(value)
        self._send(worker)

    def _send(self, worker: _Worker) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the next wait tells
            while worker.ready and self._waiting and len(worker.jobs) < self._window(worker):
                job = self._waiting.popleft()
                worker.jobs.append(job)
                worker.connection.send(job)
            if worker.ready and not self._waiting and not worker.jobs:
                worker.connection.send(None)

    def _window(self, worker: _Worker) -> int:
        return self._WINDOW if self._suspects.isdisjoint([self._waiting[0], *worker.jobs]) else 1

    def _ended(self, worker: _Worker) -> None:
        """A worker closed its pipe: it had nothing left to do, or was killed, say for its memory."""
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join(_STOP_SECONDS)
        code = worker.process.exitcode
        if not worker.ready:
            raise LicError(f"a worker process ended with {code} while it started")
        if len(worker.jobs) == 1:
            why = "was killed, perhaps for want of memory" if code == -9 else f"ended with {code}"
            self._done(Outcome(worker.jobs[0], failure=Failure(f"its worker process {why}", 1, "")))
        else:
            self._suspects.update(worker.jobs)
            self._waiting.extendleft(reversed(worker.jobs))
        if self._waiting and len(self._workers) < self._processes:
            self._start()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_STOP_SECONDS)
            worker.process.kill()
            worker.connection.close()


class _Relay(logging.handlers.QueueHandler):
    """Sends messages to the parent, which knows whether a progress bar is in the way."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        super().__init__(SimpleQueue())
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        self._send("log", record)


def _worker(connection: Connection, operation: Operation, level: int) -> None:
    """The body of a worker process. Ends when it is told to, terminated, or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where _blocked_interrupts can do nothing
    signal.signal(signal.SIGTERM, _interrupt)
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with lock:
            connection.send((kind, value))

    def jobs() -> Iterator[Job]:
        with contextlib.suppress(EOFError, ConnectionError):
            while (job := connection.recv()) is not None:
                yield job

    with contextlib.suppress(BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        try:
            log.handlers[:] = [_Relay(send)]
            log.propagate = False
            log.setLevel(level)
            if level > logging.DEBUG:
                warnings.simplefilter("ignore")
            try:
                codec = operation.codec()
                device = codec.device
            except Exception as error:
                send("failed", failure_of(error))
                return
            send("ready", device)
            pipeline(operation, codec, jobs(), lambda outcome: send("done", outcome))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway: nothing is to be raised in its last breath


@contextlib.contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Processes started here never get Ctrl-C, which reaches every process of a terminal: their parent decides."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fair_threads(processes: int) -> int | None:
    """CPU threads for each process; None, which is torch's choice, where the user has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
