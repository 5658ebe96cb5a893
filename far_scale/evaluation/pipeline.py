"""An evaluation from end to end: opening it, computing its batches on all processes, aggregating and reporting."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, read_config
from far_scale.distributed.process_group import (
    Processes,
    all_ranks_or_raise,
    broadcast_from_main,
    read_launcher_variables,
    stop_processes,
)
from far_scale.evaluation.aggregate import SCORES_FILE, seconds_by_kind, write_scores
from far_scale.evaluation.batches import PRECISIONS, SETTINGS_FILE, Evaluation
from far_scale.evaluation.clip_sets import ClipSource, open_clips
from far_scale.evaluation.generate import sampling_config
from far_scale.evaluation.protocol import Protocol
from far_scale.evaluation.report import REPORT_FILES, write_report
from far_scale.evaluation.rollouts.runner import load_autoencoder
from far_scale.model.hub import find_model
from far_scale.model.model_files import CONFIG_FILE, weights_digest
from far_scale.train.checkpoint.export import export_if_needed
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import read_json, write_json

_PROCESS_TIMEOUT = datetime.timedelta(days=7)  # processes wait this long for the slowest one


class WorkShard(NamedTuple):
    """The batches that one process computes: number `task`, `task + tasks`, and so on."""

    task: int
    tasks: int


@contextlib.contextmanager
def start_processes(device: str | None) -> Iterator[Processes]:
    """The processes that torchrun or srun started, or a single one.

    Args:
        device: "cpu" or "cuda"; None for cuda where there is a GPU.

    Raises:
        UserError: the launcher's variables are incomplete, or there is no GPU.
    """
    rank, world_size = read_launcher_variables()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here that PyTorch can use; take --device cpu")
    torch_device = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        torch_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(torch_device)
    else:
        torch.set_num_threads(1)  # sums depend on the number of threads
    if world_size > 1:
        dist.init_process_group("gloo", timeout=_PROCESS_TIMEOUT)
    try:
        yield Processes(rank, world_size, torch_device)
    finally:
        stop_processes()


def evaluate(
    opener: Callable[[bool], Evaluation],
    processes: Processes,
    shard: WorkShard | None,
    merge_only: bool,
    keep_samples: bool,
) -> dict[str, Any] | None:
    """Compute what is missing of an evaluation, and aggregate its scores; every process calls this.

    Args:
        opener: opens the evaluation; its argument is whether this process opens it first.
        shard: of an independent task, which leaves aggregation to a later call; None to split the batches over the
            processes and aggregate.
        merge_only: compute nothing.
        keep_samples: leave the samples in the folder.

    Returns:
        The content of scores.json; None for a task.

    Raises:
        UserError: on all processes, an error of one of them.
    """
    opened: list[Evaluation] = []
    broadcast_from_main(lambda: opened.append(opener(True)), processes)
    evaluation = all_ranks_or_raise(lambda: opened[0] if opened else opener(False), processes)
    scores = all_ranks_or_raise(lambda: read_finished(evaluation, keep_samples), processes)
    if scores is not None:
        return scores
    if not merge_only:
        own_shard = shard or WorkShard(processes.rank, processes.world_size)
        all_ranks_or_raise(lambda: compute_shard(evaluation, own_shard), processes)
    if shard is not None:
        return None
    return broadcast_from_main(lambda: merge_and_report(evaluation, keep_samples), processes)


def open_evaluation(
    source: Path,
    step: int | None,
    protocol: Protocol,
    out: Path,
    clip_source: ClipSource,
    device: torch.device,
    first: bool,
) -> Evaluation:
    """Open an evaluation, and claim its folder.

    Args:
        source: a model directory, a repository of the hub, or a run; its checkpoint is exported into `out`/model.
        step: of a run's checkpoint; None for the one that `out` was begun with, or the latest.
        clip_source: where the clips are.
        first: whether this process exports the checkpoint and claims the folder; the others follow.

    Raises:
        UserError: model, clips, protocol and folder do not fit together.
    """
    check_clip_count(protocol)
    if not (source / CONFIG_FILE).is_file() and (source / "checkpoints").is_dir():
        model_dir = out / "model"
        if first:
            export_if_needed(source, step or _previous_step(out), protocol.sampling.weights, model_dir)
    elif step is not None:
        raise UserError(f"{source}: a model directory holds one set of weights; leave --step out, or name the run")
    else:
        model_dir = find_model(source)
    evaluation = open_model_evaluation(source, model_dir, protocol, out, clip_source, device)
    if first:
        evaluation.begin()
    return evaluation


def open_model_evaluation(
    source: Path,
    model_dir: Path,
    protocol: Protocol,
    out: Path,
    clip_source: ClipSource,
    device: torch.device,
) -> Evaluation:
    """Open the evaluation of a model directory that was made from `source`; nothing is written.

    Raises:
        UserError: model, clips and protocol do not fit together.
    """
    config, metadata = read_config(model_dir)
    _check_model(model_dir, metadata, protocol)
    sampling_config(protocol, config, protocol.sampling.seeds[0]).check(config)
    dtype = PRECISIONS[protocol.sampling.autoencoder_precision]
    autoencoder = load_autoencoder(metadata, device, dtype)
    clips, protocol = open_clips(protocol, config, metadata, autoencoder.downsample, clip_source)
    weights = describe_weights(source, model_dir, metadata)
    return Evaluation(protocol, clips, model_dir, metadata, weights, autoencoder, out, device)


def check_clip_count(protocol: Protocol) -> None:
    """Check that a protocol's scores are defined for its number of clips.

    Raises:
        UserError: FVD of fewer than 2 clips.
    """
    if "fvd" in protocol.metrics and protocol.clips.count < 2:
        raise UserError(f"protocol {protocol.name}: FVD compares sets of at least 2 clips; take more, or leave fvd out")


def compute_shard(evaluation: Evaluation, shard: WorkShard) -> None:
    """Compute the missing batches of a shard, with a progress bar on standard error."""
    batches = evaluation.batches()[shard.task :: shard.tasks]
    missing = evaluation.missing(batches)
    interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds; nobody watches a job's log
    with tqdm(
        total=len(batches), initial=len(batches) - len(missing), desc=f"evaluate {evaluation.out}", unit="batch",
        mininterval=interval, maxinterval=interval,
    ) as bar:  # fmt: skip
        for _ in evaluation.compute(missing):
            bar.update()


def merge_and_report(evaluation: Evaluation, keep_samples: bool) -> dict[str, Any]:
    """Aggregate the batches into scores.json, write the report, and remove the samples unless they are kept.

    Raises:
        UserError: batches are missing.
    """
    protocol, (config, _) = evaluation.protocol, read_config(evaluation.model_dir)
    guidance = sampling_config(protocol, config, protocol.sampling.seeds[0]).guidance
    scores = write_scores(evaluation, guidance)
    write_json(evaluation.out / "timing.json", seconds_by_kind(evaluation))
    write_report(evaluation.out)
    if not keep_samples:
        shutil.rmtree(evaluation.out / "samples", ignore_errors=True)
    return scores


def read_finished(evaluation: Evaluation, keep_samples: bool) -> dict[str, Any] | None:
    """The content of scores.json if this evaluation is finished, with all samples if they are kept; else None."""
    out, seeds = evaluation.out, evaluation.protocol.sampling.seeds
    if not all((out / name).is_file() for name in (SCORES_FILE, *REPORT_FILES)):
        return None
    if keep_samples and not all(
        evaluation.sample_file(clip, seed).is_file() for clip in range(len(evaluation.clips.keys)) for seed in seeds
    ):
        return None
    scores: dict[str, Any] = read_json(out / SCORES_FILE, "scores")
    return scores if evaluation.first_difference(scores) is None else None


def describe_weights(source: Path, model_dir: Path, metadata: ModelMetadata) -> dict[str, Any]:
    """The evaluated weights for scores.json: their source, and the SHA-256 of their files."""
    digest = weights_digest(model_dir)
    training = metadata.training
    if isinstance(training, TrainingMetadata):
        return {"source": str(source), "kind": training.weights, "step": training.step, "sha256": digest}
    return {"source": str(source), "kind": "imported", "imported_from": training.imported_from, "sha256": digest}


def _previous_step(out: Path) -> int | None:
    """The run's step that the folder was begun with, so that a restart evaluates the same one."""
    if not (out / SETTINGS_FILE).is_file():
        return None
    previous = read_json(out / SETTINGS_FILE, "evaluation")
    step = previous.get("weights", {}).get("step") if isinstance(previous, dict) else None
    return step if type(step) is int else None


def _check_model(model_dir: Path, metadata: ModelMetadata, protocol: Protocol) -> None:
    training, kind = metadata.training, protocol.sampling.weights
    if not isinstance(training, TrainingMetadata):
        print_warning(f"{model_dir}: imported weights are taken for the {kind} weights of protocol {protocol.name}")
    elif training.weights != kind:
        raise UserError(
            f"{model_dir}: holds the run's {training.weights} weights, and protocol {protocol.name} takes {kind}; "
            f"export them with --weights {kind}"
        )
