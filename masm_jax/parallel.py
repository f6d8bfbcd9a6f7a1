"""Work on many cases in several processes."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any


def in_order(
    function: Callable[..., Any], jobs: Iterable[tuple], *, workers: int, needs: str = ""
) -> Generator[Any, None, None]:
    """Results of ``function(*job)`` in the order of the jobs.

    Jobs are taken from their iterator as workers get free, so that they may be made while earlier
    ones are worked on, and need not all be in memory.

    Args:
        function: of a module that workers can import; catches what may go wrong with one job.
        jobs: tuples of arguments that can be pickled.
        workers: processes; 0 works in this one.
        needs: what a worker takes, such as "0.5 GB", for the message when one dies.

    Yields:
        What the function returns.

    Raises:
        ValueError: a worker process died.
    """
    if workers == 0:
        for job in jobs:
            yield function(*job)
        return
    # Spawned, so that no lock or thread of this process is copied.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
    )
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for job in jobs:
            with _of_workers():
                pending.append(pool.submit(function, *job))
            while pending and (len(pending) > workers + 1 or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.BrokenExecutor as error:
        raise ValueError(
            f"a worker process died ({error}; often: out of memory"
            f"{f', a worker needs about {needs}' if needs else ''}); run again with --workers "
            f"below {workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _of_workers() -> Iterator[None]:
    """Processes started inside use one thread for matrix products, for many would fight over cores,
    and never see Ctrl-C, not even while they import: it is answered by the parent alone, after."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # raises what has come meanwhile
