"""The workers of `encode_videos`: one here, or several in processes of their own, and their common progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from far_scale.data.encode.worker import Job, Worker
from far_scale.data.shards.rejects import Reject
from far_scale.data.video.sources import Source
from far_scale.utils.errors import UserError

_POLL_SECONDS = 0.2
_LOG_SECONDS = 30.0  # between lines of progress in a job's log, which nobody watches


def encode_shards(job: Job, numbers: list[int], workers: int, add_rejects: Callable[[list[Reject]], None]) -> None:
    """Encode these shards of a job, with frames/s and the time left on standard error.

    However many workers there are, each computes with one thread: so sums are in the same order, to the last bit.

    Args:
        add_rejects: called with the rejects of every finished shard; what it raises ends the encoding.

    Raises:
        UserError: a video that does not fit into the set, a full disk, or a process that died.
    """
    to_do = sum(len(job.sources_of(number)) for number in numbers)
    frames, videos = 0, 0
    often = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
    with tqdm(desc=f"encode {job.out}", unit="frame", mininterval=often, maxinterval=often) as bar:

        def progress(more_frames: int, more_videos: int) -> None:
            nonlocal frames, videos
            frames, videos = frames + more_frames, videos + more_videos
            # Nobody knows the frames of videos that were not read yet: they are taken to be as long as the others.
            bar.total = round(frames / videos * to_do) if videos else None
            bar.set_postfix_str(f"{videos} of {to_do} videos", refresh=False)
            bar.update(more_frames)

        if min(workers, len(numbers)) == 1:
            _encode_here(job, numbers, progress, add_rejects)
        else:
            _encode_in_processes(job, numbers, workers, progress, add_rejects)


def _encode_here(
    job: Job,
    numbers: list[int],
    progress: Callable[[int, int], None],
    add_rejects: Callable[[list[Reject]], None],
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        worker = Worker(job, job.device, progress)
        for number in numbers:
            add_rejects(worker.encode_shard(number, job.sources_of(number)))
    finally:
        torch.set_num_threads(threads)


def _encode_in_processes(
    job: Job,
    numbers: list[int],
    workers: int,
    progress: Callable[[int, int], None],
    add_rejects: Callable[[list[Reject]], None],
) -> None:
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads and GPU state
    started, frames, videos = spawn.Value("i", 0), spawn.Value("q", 0), spawn.Value("q", 0)
    counters = (started, frames, videos)
    arguments = (replace(job, sources=()), *counters)  # a million sources would go to every worker
    pool = ProcessPoolExecutor(min(workers, len(numbers)), spawn, initializer=_begin, initargs=arguments)
    try:
        waiting = {pool.submit(_encode_one, number, job.sources_of(number)) for number in numbers}
        shown_frames, shown_videos = 0, 0
        while waiting:
            done, waiting = wait(waiting, _POLL_SECONDS, FIRST_EXCEPTION)
            # Without the locks: a worker that was killed might hold them.
            seen_frames, seen_videos = frames.get_obj().value, videos.get_obj().value
            if (seen_frames, seen_videos) != (shown_frames, shown_videos):
                progress(seen_frames - shown_frames, seen_videos - shown_videos)
                shown_frames, shown_videos = seen_frames, seen_videos
            for future in done:
                add_rejects(future.result())
    except BrokenProcessPool:
        raise UserError(
            f"{job.out}: an encoding process died, maybe for want of memory; run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None  # of a worker process


def _begin(job: Job, started: Any, frames: Any, videos: Any) -> None:
    """Make this process a worker; the counters are shared: of workers, and of frames and videos encoded so far."""
    global _worker
    begin_worker()
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    device = f"cuda:{number % torch.cuda.device_count()}" if job.device == "cuda" else job.device

    def progress(more_frames: int, more_videos: int) -> None:
        for counter, more in ((frames, more_frames), (videos, more_videos)):
            with counter.get_lock():
                counter.value += more

    _worker = Worker(job, device, progress)


def begin_worker() -> None:
    """Make this process one that computes with one thread, and ends with its parent and at Ctrl-C."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C goes to all: the parent says it, without a trace
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Workers of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_one(number: int, sources: tuple[Source, ...]) -> list[Reject]:
    assert _worker is not None
    return _worker.encode_shard(number, sources)
