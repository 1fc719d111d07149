"""Batches on a Dask cluster that runs already. Needs the packages of ``lic[cluster]``, here and on the workers."""

from __future__ import annotations

import functools
import importlib.util
import logging
import logging.handlers
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lic import __version__, files, work
from lic.batch import Job
from lic.errors import LicError
from lic.outcome import Failure, Outcome, failure_of, log
from lic.work import Operation

if TYPE_CHECKING:
    from distributed import Client, Future

    from lic.api import Codec
    from lic.engine import Done

_coding = threading.Lock()  # a worker's threads read and write at once, but the model is one's at a time


def check() -> None:
    """Raises LicError when the packages are not there."""
    if importlib.util.find_spec("distributed") is None:
        raise LicError("--engine dask needs further packages: pip install 'lic[cluster]'")


def run(operation: Operation, jobs: Sequence[Job], scheduler: str, done: Done) -> None:
    """Do all jobs on the cluster whose scheduler has that address, and call ``done`` for each.

    Local paths must mean the same on the workers. Raises LicError when the cluster cannot be reached, has no
    workers, or its workers cannot do the operation, and what ``done`` raises.
    """
    from distributed import Client, as_completed

    if log.level > logging.DEBUG:
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # its troubles are told here, in one line
    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise LicError(f"no Dask scheduler answers at {scheduler}") from error
    with client:
        _check_workers(client, operation, scheduler)
        futures: dict[Future, Job] = {}
        for job in jobs:
            task = Job(files.absolute(job.source), files.absolute(job.target))
            futures[client.submit(_task, operation, task, log.level, pure=False)] = job
        try:
            for future in as_completed(list(futures)):
                job = futures.pop(future)
                done(_outcome(future, job))
        finally:
            client.cancel(list(futures))


def _outcome(future: Future, job: Job) -> Outcome:
    try:
        outcome, messages = future.result()
    except Exception as error:  # the worker died, again and again, or the task was lost
        return Outcome(job, failure=failure_of(error, job.source))
    for message in messages:
        log.handle(message)
    return Outcome(job, outcome.facts, outcome.failure)


def _check_workers(client: Client, operation: Operation, scheduler: str) -> None:
    """Load the model on every worker: where that fails no file would succeed."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if not workers:
        raise LicError(f"the Dask cluster at {scheduler} has no workers")
    for address, answer in client.run(_prepare, operation, on_error="return").items():
        if isinstance(answer, ImportError):
            raise LicError(f"worker {address}: lic is not installed there ({answer})")
        if isinstance(answer, BaseException):
            raise LicError(f"worker {address}: {failure_of(answer).line}")
        version, device = answer
        if isinstance(device, Failure):
            raise LicError(f"worker {address}: {device.line}")
        if version != __version__:
            raise LicError(f"worker {address} has lic {version}, this is {__version__}")
        log.info("worker %s runs on %s", address, device)


# ----------------------------------------------------------------------------------------------------
# on the workers


@functools.lru_cache(maxsize=2)
def _codec(operation: Operation) -> Codec:
    return operation.codec()


def _prepare(operation: Operation) -> tuple[str, str | Failure]:
    """The version of lic here, and the device that it runs on."""
    try:
        return __version__, _codec(operation).device
    except Exception as error:
        return __version__, failure_of(error)


def _task(operation: Operation, job: Job, level: int) -> tuple[Outcome, list[logging.LogRecord]]:
    """One job, and the messages about it."""
    messages: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    log.setLevel(level)
    handler = logging.handlers.QueueHandler(messages)
    thread = threading.get_ident()
    handler.addFilter(lambda record: record.thread == thread)
    log.addHandler(handler)
    try:
        picture, size = work.load(operation, job)
        codec = _codec(operation)
        with _coding:
            result = operation.code(codec, picture)
        outcome = Outcome(job, work.save(operation, job, picture, size, result, codec.device))
    except Exception as error:
        outcome = Outcome(job, failure=failure_of(error, job.source))
    finally:
        log.removeHandler(handler)
    return outcome, [messages.get() for _ in range(messages.qsize())]
