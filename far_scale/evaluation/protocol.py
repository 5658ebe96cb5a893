"""A protocol: everything that fixes an evaluation's scores, as a typed YAML file in recipes/protocols/.

Two scores can be compared if the hashes of their protocols are equal. The hash covers every field that changes a
score, and the fingerprint of the clips; texts and names are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from far_scale.config.reference import explain, reference
from far_scale.config.schema import Count, Fraction, Grid, Section, valid_guidance
from far_scale.config.yaml_loader import PROTOCOL, read_document
from far_scale.evaluation.codec import H264_BLOCK
from far_scale.evaluation.metric_networks import MIN_FRAMES
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError

Metric = Literal["lpips", "psnr", "ssim", "fvd"]
METRICS: tuple[Metric, ...] = ("lpips", "psnr", "ssim", "fvd")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ClipsSection(Section):
    """Which clips are evaluated."""

    source: str
    """Description of the videos; not hashed."""
    count: Count
    """Number of clips; a set with fewer is refused."""
    every: Count = 1
    """Take every n-th video of the set, from the first."""
    per_class: Count | None = None
    """Draw this many videos of each class in a random order by clips.seed, then take clips.count of them; null: take
    clips in the order of the set."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of clips.per_class."""
    start: Annotated[int, Field(ge=0)] = 0
    """Frame of the video that a clip starts with."""
    stride: Count = 1
    """Take every n-th frame from there; this sets the frame rate of the evaluation."""
    short: Literal["refuse", "stride-1"] = "refuse"
    """If a video is too short: refuse is an error; stride-1 takes its frames without stride, as the official code does
    (an error if there are still too few)."""
    size: Count
    """Height and width of a clip in pixels: the shorter side is scaled to it, and the centre is cropped."""
    resize: Literal["pillow", "torch"] = "pillow"
    """How frames are scaled: in 8 bits, or in float32 with antialiasing, as in the official code."""
    pixels: Literal["recorded", "decoded"] = "recorded"
    """The ground truth: recorded pixels, or the decoded latents of a shard set (set by --shards)."""
    fingerprint: Sha256 | None = None
    """SHA-256 of the clips (`clips.fingerprint`); others are refused. Null accepts any clips and hashes theirs."""


class SamplingSection(Section):
    """Sampling from the model."""

    given: Annotated[int, Field(ge=0)]
    """Ground-truth frames given to the model."""
    predicted: Count
    """Frames that the model predicts after them."""
    trajectories: Count = 1
    """Samples of each clip. LPIPS, PSNR and SSIM take the best one; FVD is averaged over the samples."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**64)], ...], Field(strict=False, min_length=1)] = (0,)
    """Seeds of the noise; scores are means over them."""
    steps: Annotated[int, Field(ge=1, le=1000)]
    """Euler steps per frame."""
    grid: Grid = "official"
    """Noise levels of the steps (see sample.grid)."""
    window_stride: Count = 1
    """Frames by which a full window slides (see sample.window_stride)."""
    guidance: Annotated[float, AfterValidator(valid_guidance)] = 1.0
    """Classifier-free guidance of a model with labels or actions (see sample.guidance); others sample at 1."""
    context_noise: Fraction = 0.0
    """Noise level of clean frames (see sample.context_noise)."""
    weights: Literal["ema", "model"] = "ema"
    """Weights of a run to evaluate."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model."""
    autoencoder_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the autoencoder."""
    batch: Count
    """Clips that are sampled together; the last batch is padded, so that results do not depend on the batch."""


class FramesSection(Section):
    """Conversion of samples to the frames that are compared."""

    given: Literal["true", "decoded"] = "true"
    """The given frames in a sample: true pixels, or the autoencoder's reconstruction, as in the official code."""
    rounding: Literal["nearest", "down"] = "nearest"
    """Rounding of pixels to 8 bits; the official code rounds down."""
    border: bool = False
    """Draw a red border of one pixel on given frames of sample and truth: the official code's `anno_context`."""
    codec: Literal["none", "h264"] = "none"
    """none: lossless. h264: sample and truth side by side through an MP4 (crf 23, yuv420p, 8 frames/s), as in the
    official code; sides are multiples of 16."""


class FVDSection(Section):
    """Frechet Video Distance: 400 logits of I3D in float32, frames resized to 224 between half-pixel centres, without
    antialiasing; covariances with N - 1."""

    frames: Literal["all", "predicted"] = "all"
    """Input frames of the network."""
    batch: Count = 4
    """Batch size of the network; the last batch is padded."""
    network: Sha256
    """SHA-256 of the network's tensors."""
    name: str | None = None
    """Name of an imported custom network; null for the standard one of FVD."""


class LPIPSSection(Section):
    """LPIPS v0.1: the mean over the predicted frames of a clip."""

    net: Literal["alex", "vgg"] = "alex"
    """The backbone."""
    range: Literal["[-1, 1]", "[0, 1]"] = "[-1, 1]"
    """Range of the network's input pixels. [-1, 1] is right; the official code uses [0, 1], and its distances are too
    low."""
    network: Sha256
    """SHA-256 of the network's tensors."""
    name: str | None = None
    """Name of an imported custom network; null for the standard one of LPIPS."""


class PSNRSection(Section):
    """PSNR with range 1."""

    mean_of: Literal["frames", "clips", "set"] = "frames"
    """frames: the mean of each frame's PSNR, as in the official code. clips: the mean of each clip's PSNR. set: the
    PSNR of the mean squared error over all clips, which exactly repeated frames do not dominate."""


class SSIMSection(Section):
    """SSIM as in torchmetrics: a Gaussian window of std 1.5, range 1."""

    mean_of: Literal["frames"] = "frames"
    """The mean over the predicted frames of a clip, on RGB."""


class Published(Section):
    """Published scores for a protocol."""

    model: str
    """The model with these scores."""
    lpips: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    fvd: float | None = None


class Protocol(Section):
    """Everything that fixes a score."""

    name: str
    """The protocol's name; without it, the file's name."""
    about: str = ""
    """Description; not hashed."""
    clips: ClipsSection
    sampling: SamplingSection
    frames: FramesSection = FramesSection()
    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)]
    """Metrics to compute; --metrics can select others that have a section."""
    fvd: FVDSection | None = None
    lpips: LPIPSSection | None = None
    psnr: PSNRSection | None = None
    ssim: SSIMSection | None = None
    published: Annotated[tuple[Published, ...], Field(strict=False)] = ()
    """Published scores to print beside ours; only if they were computed with the choices of this protocol."""

    @model_validator(mode="after")
    def _check(self) -> Protocol:
        for key, problem in self._impossible():
            raise PydanticCustomError("impossible", "{problem}", {"key": key, "problem": problem})
        return self

    def _impossible(self) -> Iterator[tuple[str, str]]:
        sampling = self.sampling
        for metric in self.metrics:
            if getattr(self, metric) is None:
                yield "metrics", f"{metric} has no section; write `{metric}:` with its settings"
        if not sampling.given and set(self.metrics) != {"fvd"}:
            yield (
                "metrics",
                "without given frames there are no true frames to compare with, only fvd is possible; set it to [fvd]",
            )
        if len(set(sampling.seeds)) < len(sampling.seeds):
            yield "sampling.seeds", "names a seed twice; remove one"
        if self.frames.codec == "h264" and self.clips.size % H264_BLOCK:
            yield (
                "clips.size",
                f"{self.clips.size}, and h264 needs a multiple of {H264_BLOCK}; set frames.codec to none",
            )
        if self.fvd is not None and self.fvd_frames < MIN_FRAMES:
            yield "fvd.frames", f"{self.fvd_frames} frames, and I3D needs {MIN_FRAMES}; remove fvd, or predict more"

    @property
    def total_frames(self) -> int:
        """F: given and predicted frames of a clip."""
        return self.sampling.given + self.sampling.predicted

    @property
    def fvd_frames(self) -> int:
        """Number of input frames of FVD's network."""
        return self.total_frames if self.fvd is None or self.fvd.frames == "all" else self.sampling.predicted

    def hashed_values(self) -> dict[str, Any]:
        """All fields that change a score."""
        texts: dict[str, Any] = dict.fromkeys(("name", "about", "metrics", "published"), True)
        texts |= {"clips": {"source"}, "fvd": {"name"}, "lpips": {"name"}}
        # Keys that came later leave the hashes of before as they are.
        later = (("grid", "official"), ("window_stride", 1))
        texts["sampling"] = {name for name, default in later if getattr(self.sampling, name) == default}
        return self.model_dump(mode="json", exclude=texts)

    def hash(self) -> str:
        """SHA-256 of `hashed_values`."""
        text = json.dumps(self.hashed_values(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def with_clips(self, **changes: Any) -> Protocol:
        """This protocol with other fields of `clips`: another protocol, with another hash.

        Published scores hold only for the original clips: they are dropped if any field but the fingerprint changes.
        """
        update: dict[str, Any] = {"clips": self.clips.model_copy(update=changes)}
        if set(changes) - {"fingerprint"}:
            update["published"] = ()
        return self.model_copy(update=update)

    def with_metrics(self, metrics: tuple[Metric, ...]) -> Protocol:
        """This protocol with only some of its metrics; the hash is unchanged, since the scores are the same.

        Raises:
            UserError: one of them has no section in the protocol.
        """
        for metric in metrics:
            if getattr(self, metric) is None:
                known = ", ".join(name for name in METRICS if getattr(self, name) is not None)
                raise UserError(f"--metrics {metric}: protocol {self.name} does not have it; it has {known}")
        if not self.sampling.given and set(metrics) != {"fvd"}:
            raise UserError(f"--metrics: protocol {self.name} gives no frames, so it has only fvd")
        return self.model_copy(update={"metrics": tuple(name for name in METRICS if name in metrics)})


def load_protocol(path_or_name: str | Path) -> Protocol:
    """Read and check a protocol: a file, or a name in recipes/protocols, such as `vizdoom-8to8`.

    Raises:
        UserError: one line with file, line, key and fix of every error.
    """
    document = read_document(path_or_name, kind=PROTOCOL)
    try:
        return Protocol.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, document, Protocol) from None


@command_line
def main() -> None:
    """Print the reference of all keys."""
    print(f"The keys of a protocol:\n{reference(Protocol)}")


if __name__ == "__main__":
    main()
