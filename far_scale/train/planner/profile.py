"""The measured steps of one machine: a dated file, without which no time is predicted. None comes with far_scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from far_scale.train.planner.time_model import Work
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json, write_json

FOLDER = Path("profiles")
"""Where profiles are written and looked for, in the working folder."""
FORMAT = "far_scale.profile/1"


@dataclass(frozen=True)
class Settings:
    """What a profile holds for, beside the hardware.

    Attributes:
        precision, compile: as in the recipe's train section.
        attention: the kernel.
        zero_stage: of ZeRO, whose hooks take the host's time.
    """

    precision: str
    compile: bool
    attention: str
    zero_stage: int

    def text(self) -> str:
        """As recipe keys."""
        return (
            f"train.precision={self.precision} train.compile={str(self.compile).lower()} "
            f"train.attention={self.attention} train.zero_stage={self.zero_stage}"
        )


@dataclass(frozen=True)
class Measurement:
    """A measured step.

    Attributes:
        shape: in words.
        work: of a rank.
        seconds: the median of several steps.
    """

    shape: str
    work: Work
    seconds: float


@dataclass(frozen=True)
class Profile:
    """A machine's.

    Attributes:
        date: ISO 8601.
        hardware: name of the GPU, or of the processor.
        gpu: short name, see `short_name`.
        ranks: that measured.
        versions: of the packages that matter.
        settings: that were measured.
        measurements: the steps.
        coefficients: seconds of a unit of work, see `fit_seconds`.
        disk_write, disk_read: bytes/s of one process in `disk_folder`, past the cache.
        disk_folder: where.
    """

    date: str
    hardware: str
    gpu: str
    ranks: int
    versions: dict[str, str]
    settings: Settings
    measurements: tuple[Measurement, ...]
    coefficients: dict[str, float]
    disk_write: float
    disk_read: float
    disk_folder: str

    def write(self, folder: Path) -> Path:
        """Write a new file into `folder`; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        time = re.sub(r"[^0-9T]", "", self.date)[:15]
        path = folder / f"{time}-{self.gpu}-{self.settings.precision}-zero{self.settings.zero_stage}.json"
        write_json(path, {"format": FORMAT, **asdict(self)})
        return path


def read_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        UserError: the file is missing or no profile.
    """
    values = read_json(path, "the profile")
    try:
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return _parse({name: value for name, value in values.items() if name != "format"})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not a profile of this version ({error}); write one with far-scale plan RECIPE --measure"
        ) from None


def _parse(values: dict[str, Any]) -> Profile:
    measurements = tuple(
        Measurement(row["shape"], Work(**row["work"]), float(row["seconds"])) for row in values["measurements"]
    )
    settings = Settings(**values["settings"])
    return Profile(**{**values, "measurements": measurements, "settings": settings})


def newest_profile(folder: Path, gpu: str, settings: Settings) -> tuple[Profile | None, str]:
    """The newest profile of a kind of GPU with these settings, and a line that names it or says how to get one.

    Raises:
        UserError: a file in the folder is no profile.
    """
    profiles = {path: read_profile(path) for path in sorted(folder.glob("*.json"))}
    of_gpu = {path: profile for path, profile in profiles.items() if profile.gpu == gpu}
    fitting = {path: profile for path, profile in of_gpu.items() if profile.settings == settings}
    if fitting:
        path, newest = max(fitting.items(), key=lambda item: item[1].date)
        return newest, (
            f"{path}: {newest.hardware}, {newest.date[:10]}, {len(newest.measurements)} measured steps on "
            f"{newest.ranks} rank{'s' if newest.ranks > 1 else ''}"
        )
    others = "; ".join(sorted({profile.settings.text() for profile in of_gpu.values()}))
    found = f"only with {others}" if others else "none"
    return None, (
        f"not predicted: {folder}/ has no profile of {gpu} with {settings.text()} ({found}); far-scale plan RECIPE "
        "--measure with these keys, on a machine with such a GPU, writes one"
    )


def short_name(hardware: str) -> str:
    """`h100` of a GPU's name such as `NVIDIA H100 80GB HBM3`; other names in small letters, without spaces."""
    known = re.search(r"\b(A100|H100|H200|B200)\b", hardware)
    return known[1].lower() if known else re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
