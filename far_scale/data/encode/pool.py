"""Runs the workers of an encoding, in this process or in several, with one progress bar."""

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

from far_scale.data.encode.job import EncodingJob
from far_scale.data.encode.worker import Worker
from far_scale.data.shards.rejects import Reject
from far_scale.data.video.sources import Source
from far_scale.utils.errors import UserError

_POLL_SECONDS = 0.2
_LOG_SECONDS = 30.0  # between lines of progress in a log file


def encode_shards(
    job: EncodingJob, shards: list[int], workers: int, add_rejects: Callable[[list[Reject]], None]
) -> None:
    """Encode these shards of a job, with frames/s and the remaining time on standard error.

    Each worker computes with one thread, so that sums have the same order with any number of workers.

    Args:
        add_rejects: called with the rejects of every finished shard; an exception in it ends the encoding.

    Raises:
        UserError: a file that cannot be read, a full disk, or a process that died.
    """
    total_videos = sum(len(job.sources_of(shard)) for shard in shards)
    frames, videos = 0, 0
    interval = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
    with tqdm(desc=f"encode {job.out}", unit="frame", mininterval=interval, maxinterval=interval) as bar:

        def progress(new_frames: int, new_videos: int) -> None:
            nonlocal frames, videos
            frames, videos = frames + new_frames, videos + new_videos
            # The lengths of unread videos are unknown: take them to be as long as the others.
            bar.total = round(frames / videos * total_videos) if videos else None
            bar.set_postfix_str(f"{videos} of {total_videos} videos", refresh=False)
            bar.update(new_frames)

        if min(workers, len(shards)) == 1:
            _encode_in_process(job, shards, progress, add_rejects)
        else:
            _encode_in_pool(job, shards, workers, progress, add_rejects)


def _encode_in_process(
    job: EncodingJob,
    shards: list[int],
    progress: Callable[[int, int], None],
    add_rejects: Callable[[list[Reject]], None],
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        worker = Worker(job, job.device, progress)
        for shard in shards:
            add_rejects(worker.encode_shard(shard, job.sources_of(shard)))
    finally:
        torch.set_num_threads(threads)


def _encode_in_pool(
    job: EncodingJob,
    shards: list[int],
    workers: int,
    progress: Callable[[int, int], None],
    add_rejects: Callable[[list[Reject]], None],
) -> None:
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads and GPU state
    started, frames, videos = spawn.Value("i", 0), spawn.Value("q", 0), spawn.Value("q", 0)
    counters = (started, frames, videos)
    arguments = (replace(job, sources=()), *counters)  # without the sources, which may be a million
    pool = ProcessPoolExecutor(min(workers, len(shards)), spawn, initializer=_init_encoder, initargs=arguments)
    try:
        pending = {pool.submit(_encode_shard, shard, job.sources_of(shard)) for shard in shards}
        shown_frames, shown_videos = 0, 0
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
            # without the locks: a killed worker might hold them
            total_frames, total_videos = frames.get_obj().value, videos.get_obj().value
            if (total_frames, total_videos) != (shown_frames, shown_videos):
                progress(total_frames - shown_frames, total_videos - shown_videos)
                shown_frames, shown_videos = total_frames, total_videos
            for future in done:
                add_rejects(future.result())
    except BrokenProcessPool:
        raise UserError(
            f"{job.out}: an encoding process died, maybe out of memory; run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None  # in a worker process


def _init_encoder(job: EncodingJob, started: Any, frames: Any, videos: Any) -> None:
    """Initialize a worker process; shared counters: workers started, frames and videos encoded."""
    global _worker
    init_worker()
    with started.get_lock():
        index, started.value = started.value, started.value + 1
    device = f"cuda:{index % torch.cuda.device_count()}" if job.device == "cuda" else job.device

    def progress(new_frames: int, new_videos: int) -> None:
        for counter, count in ((frames, new_frames), (videos, new_videos)):
            with counter.get_lock():
                counter.value += count

    _worker = Worker(job, device, progress)


def init_worker() -> None:
    """Initialize a worker process: one compute thread, and it exits with its parent and at Ctrl-C."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C reaches all processes: only the parent reports it
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _exit_with_parent() -> None:
    """Without it, the workers of a killed parent would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_shard(shard: int, sources: tuple[Source, ...]) -> list[Reject]:
    assert _worker is not None
    return _worker.encode_shard(shard, sources)
