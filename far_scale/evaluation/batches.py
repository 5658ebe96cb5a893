"""An evaluation's work in batches of clips, each computed once, on any process.

A batch's file is written atomically, so a killed evaluation continues with the missing batches, and any number of
processes writes the same files.

    DIR/evaluation.json               what is evaluated; another evaluation in the same folder is refused
    DIR/units/baseline-000003.npz     metrics without the model: truth, repeated last frames, reconstructions
    DIR/units/seed-0-000003.npz       metrics of the model's samples of these clips
    DIR/samples/KEY.npz               the sampled frames (those of further seeds in samples/seed-2/)
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import far_scale
from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelMetadata, load_model_dir
from far_scale.evaluation.clip_sets import Clip, ClipSet
from far_scale.evaluation.generate import FrameCodec, SampleGenerator
from far_scale.evaluation.metrics import Arrays, Metrics
from far_scale.evaluation.protocol import Protocol
from far_scale.evaluation.weights import cache_folder
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, read_json, write_json

FORMAT = "far_scale.evaluation/1"
SETTINGS_FILE = "evaluation.json"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINES = ("repeat_last", "reconstruction")


@dataclass(frozen=True)
class ClipBatch:
    """One batch of clips: their baselines, or the samples of one seed.

    Attributes:
        number: of the batch in the set.
        seed: None for the baselines.
    """

    number: int
    seed: int | None

    @property
    def name(self) -> str:
        kind = "baseline" if self.seed is None else f"seed-{self.seed}"
        return f"{kind}-{self.number:06d}"


@dataclass(frozen=True)
class Evaluation:
    """A model, the clips and protocol that it is evaluated on, and the folder of the results.

    Attributes:
        protocol: with the clips' fingerprint.
        clips: the protocol's.
        model_dir: the model directory.
        metadata: the model's.
        weights: description of the weights for scores.json.
        autoencoder: the model's.
        out: the folder DIR.
        device: of the computation.
    """

    protocol: Protocol
    clips: ClipSet
    model_dir: Path
    metadata: ModelMetadata
    weights: dict[str, Any]
    autoencoder: Autoencoder
    out: Path
    device: torch.device

    @property
    def batch_count(self) -> int:
        return -(-len(self.clips.keys) // self.protocol.sampling.batch)

    def batches(self) -> list[ClipBatch]:
        """All batches, in the order in which they are assigned to processes."""
        seeds: list[int | None] = [None, *self.protocol.sampling.seeds]
        return [ClipBatch(number, seed) for number in range(self.batch_count) for seed in seeds]

    def clip_numbers(self, batch: ClipBatch) -> range:
        """The numbers of a batch's clips."""
        size = self.protocol.sampling.batch
        return range(batch.number * size, min((batch.number + 1) * size, len(self.clips.keys)))

    def batch_file(self, batch: ClipBatch) -> Path:
        return self.out / "units" / f"{batch.name}.npz"

    def sample_file(self, clip: int, seed: int) -> Path:
        """The file of a clip's frames; those of the first seed are in samples/ itself."""
        folder = self.out / "samples"
        if seed != self.protocol.sampling.seeds[0]:
            folder = folder / f"seed-{seed}"
        return folder / f"{self.clips.keys[clip]}.npz"

    def settings(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        return {
            "format": FORMAT,
            "protocol": self.protocol.name,
            "protocol_hash": self.protocol.hash(),
            "metrics": list(self.protocol.metrics),
            "n": len(self.clips.keys),
            "weights": self.weights,
            "computed_by": computed_by(self.device),
        }

    def first_difference(self, settings: Any) -> str | None:
        """The first key of `settings` that differs from this evaluation's; the model's path may differ."""
        if not isinstance(settings, dict):
            return "format"
        for key, value in self.settings().items():
            other = settings.get(key)
            if key == "weights" and isinstance(other, dict):
                other = other | {"source": value["source"]}
            if other != value:
                return key
        return None

    def begin(self) -> None:
        """Claim the folder, or check that it was begun for this evaluation.

        Raises:
            UserError: it was begun for another evaluation, or holds files of others.
        """
        path, settings = self.out / SETTINGS_FILE, self.settings()
        if path.exists():
            if (key := self.first_difference(read_json(path, "evaluation"))) is not None:
                raise UserError(
                    f"{path}: this folder holds an evaluation with another {key} than {_abbreviated(settings[key])}; "
                    "give another --out, or remove this folder"
                )
        else:
            write_json(path, settings)
        self._check_files()

    def missing(self, batches: Sequence[ClipBatch]) -> list[ClipBatch]:
        """The batches without a complete file."""
        return [batch for batch in batches if read_arrays(self.batch_file(batch)) is None]

    def compute(self, batches: Sequence[ClipBatch]) -> Iterator[ClipBatch]:
        """Compute batches and write their files; yields each when it is done."""
        worker = _BatchWorker(self)
        for batch in batches:
            started = time.perf_counter()
            clips = [self.clips.read(number) for number in self.clip_numbers(batch)]
            arrays = worker.baseline(clips) if batch.seed is None else worker.samples(clips, batch.seed)
            arrays["seconds"] = np.array(time.perf_counter() - started)
            _write_arrays(self.batch_file(batch), arrays)
            yield batch

    def _check_files(self) -> None:
        """Refuse unknown files, so that left-overs of other samples are never aggregated."""
        seeds = self.protocol.sampling.seeds
        expected = {self.batch_file(batch) for batch in self.batches()}
        expected |= {self.sample_file(clip, seed) for clip in range(len(self.clips.keys)) for seed in seeds}
        for folder in (self.out / "units", self.out / "samples"):
            for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
                if path.is_file() and path not in expected and ".part" not in path.name:
                    raise UserError(f"{path}: does not belong to this evaluation; remove it, or give another --out")


class _BatchWorker:
    """Computes batches; networks are loaded when they are first needed."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._protocol, self._codec = evaluation.protocol, FrameCodec(evaluation.autoencoder, evaluation.protocol)

    @functools.cached_property
    def _metrics(self) -> Metrics:
        return Metrics(self._protocol, self._evaluation.device)

    @functools.cached_property
    def _generator(self) -> SampleGenerator:
        dtype = PRECISIONS[self._protocol.sampling.precision]
        model, metadata = load_model_dir(self._evaluation.model_dir, self._evaluation.device, dtype)
        return SampleGenerator(model, metadata, self._codec, self._protocol)

    def samples(self, clips: Sequence[Clip], seed: int) -> Arrays:
        """The metrics of the model's samples of some clips; writes the frames."""
        truth = np.stack([self._codec.truth(clip) for clip in clips])
        samples = self._generator.samples(clips, truth, seed)
        for clip, frames, true in zip(clips, samples, truth, strict=True):
            stored = frames[0] if len(frames) == 1 else frames
            _write_arrays(self._evaluation.sample_file(clip.number, seed), {"frames": stored, "truth": true})
        return self._metrics.compute(samples, truth)

    def baseline(self, clips: Sequence[Clip]) -> Arrays:
        """The metrics of the baselines, which do not depend on the model, from the cache folder if it has them."""
        cached = cache_folder() / "evaluation" / f"{self._baseline_key(clips)}.npz"
        arrays = read_arrays(cached)
        if arrays is None:
            arrays = self._compute_baseline(clips)
            _write_arrays(cached, arrays)
        return dict(arrays)

    def _compute_baseline(self, clips: Sequence[Clip]) -> Arrays:
        given = self._protocol.sampling.given
        truth = np.stack([self._codec.truth(clip) for clip in clips])
        arrays = self._metrics.real_logits(truth)
        baselines: dict[str, NDArray[np.uint8]] = {}
        if given:
            repeated = truth.copy()
            repeated[:, given:] = truth[:, given - 1 : given]
            baselines["repeat_last"] = repeated
        if clips[0].frames is not None:  # decoded latents are their own reconstruction
            baselines["reconstruction"] = np.stack(
                [
                    self._codec.decode(self._codec.encode(clip, len(true)))
                    for clip, true in zip(clips, truth, strict=True)
                ]
            )
        for name, frames in baselines.items():
            arrays |= {f"{name}/{key}": values for key, values in self._metrics.compute(frames[:, None], truth).items()}
        return arrays

    def _baseline_key(self, clips: Sequence[Clip]) -> str:
        """Hash of everything that the baselines of these clips depend on."""
        values = self._protocol.hashed_values()
        sampling = values.pop("sampling")
        values |= {key: sampling[key] for key in ("given", "predicted", "autoencoder_precision")}
        values["metrics"] = list(self._protocol.metrics)
        values["autoencoder"] = self._evaluation.autoencoder.weight_hash
        values["clips_read"] = [_clip_digest(clip) for clip in clips]
        values["computed_by"] = computed_by(self._evaluation.device)
        del values["clips"]  # `clips_read` has their content
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def computed_by(device: torch.device) -> dict[str, str]:
    """The versions and device on which results are bitwise equal."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"far_scale": far_scale.__version__, "torch": torch.__version__, "device": name}


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a batch's file; None if it is missing or incomplete."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _write_arrays(path: Path, arrays: Arrays) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _clip_digest(clip: Clip) -> str:
    digest = hashlib.sha256()
    for array in (clip.frames, None if clip.latents is None else clip.latents.numpy()):
        if array is not None:
            digest.update(f"{array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _abbreviated(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
