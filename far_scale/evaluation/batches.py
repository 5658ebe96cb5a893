"""The work of an evaluation in units: batches of clips, each computed once, by whichever process.

A unit's file is written atomically, so a killed evaluation goes on with the units that are missing, and any number of
processes makes the same files.

    DIR/evaluation.json               what is evaluated; another evaluation in the same folder is refused
    DIR/units/baseline-000003.npz     what does not depend on the model: truth, repeated last frames, reconstructions
    DIR/units/seed-0-000003.npz       the model's samples of these clips
    DIR/samples/KEY.npz               the frames themselves (those of further seeds in samples/seed-2/)
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
        number: of the batch.
        seed: None for the baselines.
    """

    number: int
    seed: int | None

    @property
    def name(self) -> str:
        what = "baseline" if self.seed is None else f"seed-{self.seed}"
        return f"{what}-{self.number:06d}"


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, where, and by what.

    Attributes:
        protocol: with the clips' fingerprint.
        clips: the protocol's.
        model_dir: the model directory, of the card `card`.
        weights: which weights these are, for scores.json.
        autoencoder: the model's.
        out: the folder DIR.
        device: what computes.
    """

    protocol: Protocol
    clips: ClipSet
    model_dir: Path
    card: ModelMetadata
    weights: dict[str, Any]
    autoencoder: Autoencoder
    out: Path
    device: torch.device

    @property
    def batches(self) -> int:
        return -(-len(self.clips.keys) // self.protocol.sampling.batch)

    def units(self) -> list[ClipBatch]:
        """All units, in the order in which they are shared out."""
        seeds: list[int | None] = [None, *self.protocol.sampling.seeds]
        return [ClipBatch(number, seed) for number in range(self.batches) for seed in seeds]

    def numbers(self, unit: ClipBatch) -> range:
        """The clips of a unit."""
        size = self.protocol.sampling.batch
        return range(unit.number * size, min((unit.number + 1) * size, len(self.clips.keys)))

    def unit_file(self, unit: ClipBatch) -> Path:
        return self.out / "units" / f"{unit.name}.npz"

    def sample_file(self, clip: int, seed: int) -> Path:
        """Where a clip's frames are kept; those of the first seed lie in samples/ itself."""
        folder = self.out / "samples"
        if seed != self.protocol.sampling.seeds[0]:
            folder = folder / f"seed-{seed}"
        return folder / f"{self.clips.keys[clip]}.npz"

    def settings(self) -> dict[str, Any]:
        """What evaluation.json says."""
        return {
            "format": FORMAT,
            "protocol": self.protocol.name,
            "protocol_hash": self.protocol.hash(),
            "metrics": list(self.protocol.metrics),
            "n": len(self.clips.keys),
            "weights": self.weights,
            "computed_by": computed_by(self.device),
        }

    def differs(self, settings: Any) -> str | None:
        """The first key of `settings` that is not of this evaluation; the path that the model has may differ."""
        if not isinstance(settings, dict):
            return "format"
        mine = self.settings()
        for key, value in mine.items():
            known = settings.get(key)
            if key == "weights" and isinstance(known, dict):
                known = known | {"source": value["source"]}
            if known != value:
                return key
        return None

    def begin(self) -> None:
        """Claim the folder, or find that it was begun for this very evaluation.

        Raises:
            UserError: it was begun for another one, or holds files that are not of this one.
        """
        path, mine = self.out / SETTINGS_FILE, self.settings()
        if path.exists():
            if (key := self.differs(read_json(path, "evaluation"))) is not None:
                raise UserError(
                    f"{path}: this folder holds an evaluation with another {key} than {_abbreviated(mine[key])}; give "
                    "another --out, or remove this folder"
                )
        else:
            write_json(path, mine)
        self._refuse_strangers()

    def missing(self, units: Sequence[ClipBatch]) -> list[ClipBatch]:
        """Those of the units that have no whole file yet."""
        return [unit for unit in units if read_arrays(self.unit_file(unit)) is None]

    def compute(self, units: Sequence[ClipBatch]) -> Iterator[ClipBatch]:
        """Compute units and write their files; yields each when it is done."""
        worker = _BatchWorker(self)
        for unit in units:
            started = time.perf_counter()
            clips = [self.clips.read(number) for number in self.numbers(unit)]
            arrays = worker.baseline(clips) if unit.seed is None else worker.samples(clips, unit.seed)
            arrays["seconds"] = np.array(time.perf_counter() - started)
            _write_arrays(self.unit_file(unit), arrays)
            yield unit

    def _refuse_strangers(self) -> None:
        """Refuse files that a merge would have to guess about: a left-over of other samples must never be counted."""
        seeds = self.protocol.sampling.seeds
        expected = {self.unit_file(unit) for unit in self.units()}
        expected |= {self.sample_file(clip, seed) for clip in range(len(self.clips.keys)) for seed in seeds}
        for folder in (self.out / "units", self.out / "samples"):
            for found in sorted(folder.rglob("*")) if folder.is_dir() else ():
                if found.is_file() and found not in expected and ".part" not in found.name:
                    raise UserError(f"{found}: is not of this evaluation; remove it, or give another --out")


class _BatchWorker:
    """Computes units; what is costly to load is loaded when it is first needed."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._of = evaluation
        self._protocol, self._coder = evaluation.protocol, FrameCodec(evaluation.autoencoder, evaluation.protocol)

    @functools.cached_property
    def _measure(self) -> Metrics:
        return Metrics(self._protocol, self._of.device)

    @functools.cached_property
    def _generator(self) -> SampleGenerator:
        dtype = PRECISIONS[self._protocol.sampling.precision]
        model, card = load_model_dir(self._of.model_dir, self._of.device, dtype)
        return SampleGenerator(model, card, self._coder, self._protocol)

    def samples(self, clips: Sequence[Clip], seed: int) -> Arrays:
        """The measures of the model's samples of some clips; the frames are written."""
        truth = np.stack([self._coder.truth(clip) for clip in clips])
        samples = self._generator.samples(clips, truth, seed)
        for clip, frames, true in zip(clips, samples, truth, strict=True):
            kept = frames[0] if len(frames) == 1 else frames
            _write_arrays(self._of.sample_file(clip.number, seed), {"frames": kept, "truth": true})
        return self._measure.batch(samples, truth)

    def baseline(self, clips: Sequence[Clip]) -> Arrays:
        """The measures that do not depend on the model, from the cache folder where they are there."""
        cached = cache_folder() / "evaluation" / f"{self._baseline_key(clips)}.npz"
        found = read_arrays(cached)
        if found is None:
            found = self._compute_baseline(clips)
            _write_arrays(cached, found)
        return dict(found)

    def _compute_baseline(self, clips: Sequence[Clip]) -> Arrays:
        given = self._protocol.sampling.given
        truth = np.stack([self._coder.truth(clip) for clip in clips])
        arrays = self._measure.real_logits(truth)
        baselines: dict[str, NDArray[np.uint8]] = {}
        if given:
            repeated = truth.copy()
            repeated[:, given:] = truth[:, given - 1 : given]
            baselines["repeat_last"] = repeated
        if clips[0].frames is not None:  # of decoded latents the reconstruction is the truth
            baselines["reconstruction"] = np.stack(
                [
                    self._coder.decode(self._coder.encode(clip, len(true)))
                    for clip, true in zip(clips, truth, strict=True)
                ]
            )
        for name, frames in baselines.items():
            arrays |= {f"{name}/{key}": values for key, values in self._measure.batch(frames[:, None], truth).items()}
        return arrays

    def _baseline_key(self, clips: Sequence[Clip]) -> str:
        """Names all that the baselines of these clips depend on."""
        values = self._protocol.hashed_values()
        sampling = values.pop("sampling")
        values |= {key: sampling[key] for key in ("given", "predicted", "autoencoder_precision")}
        values["metrics"] = list(self._protocol.metrics)
        values["autoencoder"] = self._of.autoencoder.weight_hash
        values["clips_read"] = [_clip_digest(clip) for clip in clips]
        values["computed_by"] = computed_by(self._of.device)
        del values["clips"]  # all of it is in what was read
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def computed_by(device: torch.device) -> dict[str, str]:
    """What results are bitwise equal on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"far_scale": far_scale.__version__, "torch": torch.__version__, "device": name}


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a unit's file; None where it is not there, or not whole."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _write_arrays(path: Path, arrays: Arrays) -> None:
    with atomic_write(path) as beside, open(beside, "wb") as file:
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
