"""An evaluation from end to end: what is evaluated, its units over all processes, the merge, the report."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from far_scale.convert.model_dir import CONFIG_FILE, ModelMetadata, TrainingMetadata, read_config
from far_scale.distributed.process_group import (
    Processes,
    all_ranks_or_raise,
    broadcast_from_main,
    stop_processes,
    take_launcher_variables,
)
from far_scale.evaluation.aggregate import SCORES_FILE, seconds_by_kind, write_scores
from far_scale.evaluation.batches import PRECISIONS, SETTINGS_FILE, Evaluation
from far_scale.evaluation.clip_sets import ClipSource, open_clips
from far_scale.evaluation.generate import guidance_of
from far_scale.evaluation.protocol import Protocol
from far_scale.evaluation.report import REPORT_FILES, write_report
from far_scale.evaluation.rollouts.runner import load_autoencoder
from far_scale.sampling.sampler import check_context_noise, check_guidance
from far_scale.train.checkpoint.export import export_if_needed
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import read_json, sha256, write_json

_PROCESS_TIMEOUT = datetime.timedelta(days=7)  # for which processes wait for the slowest one


class WorkShard(NamedTuple):
    """Which units one process computes: number `task`, `task + tasks`, and so on."""

    task: int
    tasks: int


@contextlib.contextmanager
def start_processes(device: str | None) -> Iterator[Processes]:
    """The processes that torchrun or srun started, or this one alone.

    Args:
        device: "cpu" or "cuda"; None for cuda where there is a GPU.

    Raises:
        UserError: the launcher's variables are incomplete, or there is no GPU.
    """
    rank, count = take_launcher_variables()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here that PyTorch can use; take --device cpu")
    chosen = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    else:
        torch.set_num_threads(1)  # with more, sums depend on how many
    if count > 1:
        dist.init_process_group("gloo", timeout=_PROCESS_TIMEOUT)
    try:
        yield Processes(rank, count, chosen)
    finally:
        stop_processes()


def evaluate(
    open_it: Callable[[bool], Evaluation],
    processes: Processes,
    share: WorkShard | None,
    merge_only: bool,
    keep_samples: bool,
) -> dict[str, Any] | None:
    """Compute what is missing of an evaluation, and merge it.

    Every process calls this.

    Args:
        open_it: `open_evaluation` with all its arguments but the last.
        share: of a task that knows nothing of the others, and leaves the merge to a later call; None for the
            processes' own shares and the merge.
        merge_only: compute nothing.
        keep_samples: leave the samples in the folder.

    Returns:
        What scores.json says; None of a task.

    Raises:
        UserError: on all processes, what one of them cannot read or write.
    """
    opened: list[Evaluation] = []
    broadcast_from_main(lambda: opened.append(open_it(True)), processes)
    evaluation = all_ranks_or_raise(lambda: opened[0] if opened else open_it(False), processes)
    scores = all_ranks_or_raise(lambda: read_finished(evaluation, keep_samples), processes)
    if scores is not None:
        return scores
    if not merge_only:
        own = share or WorkShard(processes.rank, processes.world_size)
        all_ranks_or_raise(lambda: compute_shard(evaluation, own), processes)
    return (
        None
        if share is not None
        else broadcast_from_main(lambda: merge_and_report(evaluation, keep_samples), processes)
    )


def open_evaluation(
    source: Path,
    step: int | None,
    protocol: Protocol,
    out: Path,
    clip_source: ClipSource,
    device: torch.device,
    first: bool,
) -> Evaluation:
    """Say what is evaluated, and claim the folder for it.

    Args:
        source: a model directory, or a run, whose checkpoint is exported into `out`/model.
        step: which checkpoint of a run; the latest where None, or the one that `out` was begun with.
        clip_source: where the clips are.
        first: whether this process exports and claims the folder; others come later.

    Raises:
        UserError: model, clips, protocol and folder do not fit together.
    """
    check_clip_count(protocol)
    model_dir = source
    if not (source / CONFIG_FILE).is_file() and (source / "checkpoints").is_dir():
        model_dir = out / "model"
        if first:
            export_if_needed(source, step or _previous_step(out), protocol.sampling.weights, model_dir)
    elif step is not None:
        raise UserError(f"{source}: a model directory holds one set of weights; leave --step out, or name the run")
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
    """`open_evaluation` of a model directory that came from `source`; nothing is written yet.

    Raises:
        UserError: model, clips and protocol do not fit together.
    """
    config, card = read_config(model_dir)
    _check_model(model_dir, card, protocol)
    check_guidance(config, guidance_of(protocol, config))
    check_context_noise(config, protocol.sampling.context_noise)
    dtype = PRECISIONS[protocol.sampling.autoencoder_precision]
    autoencoder = load_autoencoder(card, device, dtype)
    clips, protocol = open_clips(protocol, config, card, autoencoder.downsample, clip_source)
    weights = describe_weights(source, model_dir, card)
    return Evaluation(protocol, clips, model_dir, card, weights, autoencoder, out, device)


def check_clip_count(protocol: Protocol) -> None:
    """Refuse a protocol whose scores are not defined for so few clips.

    Raises:
        UserError: FVD of fewer than 2 clips.
    """
    if "fvd" in protocol.metrics and protocol.clips.count < 2:
        raise UserError(f"protocol {protocol.name}: FVD compares sets of at least 2 clips; take more, or leave fvd out")


def compute_shard(evaluation: Evaluation, share: WorkShard) -> None:
    """Compute this process's units that are missing, with the time left on standard error."""
    units = evaluation.units()[share.task :: share.tasks]
    missing = evaluation.missing(units)
    often = 0.1 if sys.stderr.isatty() else 30.0  # a job's log is watched by nobody
    with tqdm(
        total=len(units), initial=len(units) - len(missing), desc=f"evaluate {evaluation.out}", unit="unit",
        mininterval=often, maxinterval=often,
    ) as bar:  # fmt: skip
        for _ in evaluation.compute(missing):
            bar.update()


def merge_and_report(evaluation: Evaluation, keep_samples: bool) -> dict[str, Any]:
    """Merge the units into scores.json, write the report, and remove the samples unless they are to be kept.

    Raises:
        UserError: units are missing.
    """
    scores = write_scores(evaluation, guidance_of(evaluation.protocol, read_config(evaluation.model_dir)[0]))
    write_json(evaluation.out / "timing.json", seconds_by_kind(evaluation))
    write_report(evaluation.out)
    if not keep_samples:
        shutil.rmtree(evaluation.out / "samples", ignore_errors=True)
    return scores


def read_finished(evaluation: Evaluation, keep_samples: bool) -> dict[str, Any] | None:
    """What scores.json says where this evaluation is finished, with all that is to be kept; else None."""
    out, seeds = evaluation.out, evaluation.protocol.sampling.seeds
    if not all((out / name).is_file() for name in (SCORES_FILE, *REPORT_FILES)):
        return None
    if keep_samples and not all(
        evaluation.sample_file(clip, seed).is_file() for clip in range(len(evaluation.clips.keys)) for seed in seeds
    ):
        return None
    scores: dict[str, Any] = read_json(out / SCORES_FILE, "scores")
    return scores if evaluation.differs(scores) is None else None


def describe_weights(source: Path, model_dir: Path, card: ModelMetadata) -> dict[str, Any]:
    """Which weights are evaluated: where they come from, and the SHA-256 of the files that they are in."""
    files = {path.name: sha256(path) for path in sorted(model_dir.glob("*.safetensors"))}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    training = card.training
    if isinstance(training, TrainingMetadata):
        return {"source": str(source), "kind": training.weights, "step": training.step, "sha256": digest}
    return {"source": str(source), "kind": "imported", "imported_from": training.imported_from, "sha256": digest}


def _previous_step(out: Path) -> int | None:
    """The step of the run that the folder was begun with: a later start evaluates the same."""
    if not (out / SETTINGS_FILE).is_file():
        return None
    before = read_json(out / SETTINGS_FILE, "evaluation")
    step = before.get("weights", {}).get("step") if isinstance(before, dict) else None
    return step if type(step) is int else None


def _check_model(model_dir: Path, card: ModelMetadata, protocol: Protocol) -> None:
    training, wanted = card.training, protocol.sampling.weights
    if not isinstance(training, TrainingMetadata):
        print_warning(f"{model_dir}: imported weights are taken for the {wanted} weights of protocol {protocol.name}")
    elif training.weights != wanted:
        raise UserError(
            f"{model_dir}: holds the run's {training.weights} weights, and protocol {protocol.name} takes {wanted}; "
            f"export them with --weights {wanted}"
        )
