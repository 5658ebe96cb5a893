"""Reads and checks the result files of an evaluation: scores.json, per_clip.npz and the samples' frames."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from far_scale.evaluation.protocol import Metric, Protocol, Sha256
from far_scale.evaluation.rollouts.psnr_ssim import PSNR_CAP
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json

System = Literal["prediction", "repeat_last", "reconstruction"]
SYSTEMS: tuple[System, ...] = ("prediction", "repeat_last", "reconstruction")
PAIRED: tuple[Metric, ...] = ("lpips", "psnr", "ssim")  # metrics of single frames, the leading one first

Values = NDArray[np.float64]
_FIX = "run tools/evaluate.py into this folder again"


class _Section(BaseModel):
    """A section of scores.json; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Score(_Section):
    """One metric over all clips; a number that was not finite is None."""

    mean: float | None
    ci95: tuple[float | None, float | None] | None = None
    """95% interval over clips."""
    std: float | None = None
    """Over seeds."""
    infinity: float | None = None
    """FVD extrapolated to infinitely many clips."""


class Weights(_Section):
    """Which weights were evaluated."""

    source: str
    kind: str
    step: int | None = None
    """None for imported weights."""
    sha256: str


class Scores(_Section):
    """scores.json; a metric that was not computed has no entry."""

    protocol: str
    protocol_hash: Sha256
    n: int
    weights: Weights
    guidance: float
    scores: dict[Metric, Score]
    repeat_last: dict[Metric, Score] | None
    reconstruction: dict[Metric, Score] | None
    settings: Protocol

    def for_system(self, system: System) -> dict[Metric, Score] | None:
        """The scores of one system; None where it was not evaluated."""
        return self.scores if system == "prediction" else getattr(self, system)


def read_scores(folder: Path) -> Scores:
    """Read FOLDER/scores.json.

    Raises:
        UserError: it is missing, or not written by an evaluation.
    """
    path = folder / "scores.json"
    if not path.is_file():
        raise UserError(f"{path}: there are no scores here; give a folder that tools/evaluate.py --out wrote")
    return parse_scores(read_json(path, "file of scores"), path)


def parse_scores(values: Any, source: str | Path) -> Scores:
    """Check the content of a scores.json.

    Raises:
        UserError: it was not written by an evaluation; the error names `source`.
    """
    try:
        return Scores.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "all of it"
        raise UserError(f"{source}: not the scores of an evaluation ({key}: {first['msg']}); {_FIX}") from None


@dataclass(frozen=True)
class PerClip:
    """The content of per_clip.npz.

    Attributes:
        keys: of the N clips.
        given: given frames of a clip.
        values: `[N, P]` by system and metric, a value for each clip and predicted frame; PSNR is at most `PSNR_CAP`.
        psnr_of: the protocol's `psnr.mean_of`.
    """

    keys: list[str]
    given: int
    values: dict[tuple[System, Metric], Values]
    psnr_of: Literal["frames", "clips", "set"]

    def clip_scores(self, system: System, metric: Metric) -> Values:
        """`[N]`: each clip's score over its frames, as the protocol defines it."""
        values = self.values[system, metric]
        if metric == "psnr" and self.psnr_of != "frames":
            return mse_to_psnr(psnr_to_mse(values).mean(axis=1))
        return np.asarray(values.mean(axis=1))


def read_per_clip(folder: Path, protocol: Protocol) -> PerClip:
    """Read FOLDER/per_clip.npz.

    Raises:
        UserError: it is missing, or not written by an evaluation.
    """
    path = folder / "per_clip.npz"
    values: dict[tuple[System, Metric], Values] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys, given = [str(key) for key in archive["keys"]], int(archive["given"])
            for system in SYSTEMS:
                for metric in PAIRED:
                    if (name := f"{system}/{metric}") in archive:
                        values[system, metric] = _check_values(path, name, archive[name], len(keys))
    except FileNotFoundError:
        raise UserError(f"{path}: there are no scores of clips here; {_FIX}") from None
    except (KeyError, ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not the scores of clips of an evaluation ({error}); {_FIX}") from None
    return PerClip(keys, given, values, "frames" if protocol.psnr is None else protocol.psnr.mean_of)


def read_frames(sample: Path, name: str) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames `[H, W, 3]` of one array `[F, H, W, 3]` in an .npz file, reading one at a time.

    From an array `[N, F, H, W, 3]` of N trajectories the first one is read.

    Raises:
        UserError: the file or the array is missing.
    """
    try:
        with zipfile.ZipFile(sample) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of numpy's format")
            shape, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8 or len(shape) not in (4, 5) or in_fortran_order:
                raise ValueError(f"{name}: {dtype} {list(shape)} are no frames")
            height, width, channels = shape[-3:]
            for _ in range(shape[-4]):
                data = file.read(height * width * channels)
                yield np.frombuffer(data, dtype=np.uint8).reshape(height, width, channels)
    except FileNotFoundError:
        raise UserError(f"{sample}: this sample is missing; {_FIX}") from None
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{sample}: not a sample of an evaluation ({error}); {_FIX}") from None


def psnr_to_mse(psnr: Values) -> Values:
    """Mean squared error of pixels in 0..1 from a PSNR in dB."""
    return np.asarray(10 ** (-psnr / 10))


def mse_to_psnr(mse: Values) -> Values:
    """PSNR in dB from a mean squared error of pixels in 0..1."""
    return np.asarray(-10 * np.log10(mse))


def _check_values(path: Path, name: str, values: NDArray[Any], clips: int) -> Values:
    if values.ndim != 2 or len(values) != clips:
        raise ValueError(f"{name} is {list(values.shape)} for {clips} keys")
    # equal frames have an infinite PSNR
    values = np.minimum(values.astype(np.float64), PSNR_CAP) if name.endswith("/psnr") else values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {name} has values that are not finite; look at the samples of these clips")
    return values
