"""The sections of a recipe: every key with its type, limits, default and meaning.

The text under a key is what `python -m far_scale.recipe` prints for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from far_scale.config.deepspeed_keys import SET_ELSEWHERE
from far_scale.data.frame_counts import FrameCounts

if TYPE_CHECKING:
    from far_scale.model import FARConfig


def valid_guidance(value: float) -> float:
    """A guidance scale that has a meaning."""
    if value < 1 and value != -1:
        raise PydanticCustomError("guidance", "must be at least 1, or -1 for the null class alone")
    return value


Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """What all sections share: unknown keys are refused and nothing changes after the check."""

    # strict: no "8" for 8 and no true for 1; a whole number still does where a float is due.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """The size and the condition of FAR."""

    preset: Literal["B", "M", "L", "XL", "1.3B", "3B", "7B"] | None = None
    """A size, official up to XL, which gives layers and heads unless they are set here."""
    layers: Count
    """Transformer layers; given by model.preset unless set."""
    heads: Count
    """Attention heads of 64 each, so the width is 64 x heads; given by model.preset unless set."""
    patch: Count = 1
    """Side of the square of latent positions that makes one window token."""
    context_patch: Annotated[int, Field(ge=0)] = 0
    """Side of the square that makes one context token, a multiple of model.patch; 0 for a model of the window alone."""
    channels: Count = 32
    """Channels of a frame latent."""
    window: Count = 16
    """How many of a clip's last frames are window frames; those before are context."""
    causal: bool = True
    """Whether a frame sees itself and earlier frames alone. False makes a video diffusion transformer: all frames of a
    clip see each other, have one timestep and are sampled together; needs objective.clean_frame_ratio 0."""
    condition: Literal["none", "label", "action"] = "none"
    """What the model is told besides the frames: nothing, a label for each clip or an action for each frame."""
    classes: Annotated[int, Field(ge=0)] = 0
    """Number of labels or of actions; 0 without a condition."""
    condition_dropout: Fraction = 0.1
    """Probability that a condition is dropped to the null class in training, which guidance needs."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str):
            return values
        from far_scale.model.presets import PRESETS  # late: a recipe without a preset is read without loading torch

        if preset not in PRESETS:
            return values
        layers, heads = PRESETS[preset]
        return {"layers": layers, "heads": heads, **values}

    def far_config(self) -> FARConfig:
        """The model's configuration."""
        from far_scale.model import FARConfig  # late: recipes are checked without loading torch

        return FARConfig(
            layers=self.layers,
            heads=self.heads,
            patch=self.patch,
            context_patch=self.context_patch,
            channels=self.channels,
            window=self.window,
            actions=self.classes if self.condition == "action" else 0,
            labels=self.classes if self.condition == "label" else 0,
            condition_dropout=self.condition_dropout,
            causal=self.causal,
        )


class WeightedShards(Section):
    """A shard set of a mixture."""

    shards: Annotated[str, Field(min_length=1)]
    """Folder or URL of the shard set."""
    weight: Annotated[float, Field(gt=0)]
    """Its part of the clips, relative to those of the other sets."""


def _parse_shards(value: Any) -> Any:
    """`value` as a folder or as a tuple of sets with weights."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or not value:
        raise PydanticCustomError("shards", "must be a folder, or a list of {shards: FOLDER, weight: NUMBER}")
    sets = []
    for number, item in enumerate(value, start=1):
        try:
            sets.append(WeightedShards.model_validate(item))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key = "".join(f"{part}: " for part in problem["loc"])
            context = {"number": number, "problem": key + problem["msg"].replace("Input should", "must", 1)}
            message = "must be a list of {shards: FOLDER, weight: NUMBER}, but in set {number} of it {problem}"
            raise PydanticCustomError("shards", message, context) from None
    if len({weighted.shards for weighted in sets}) < len(sets):
        raise PydanticCustomError("shards", "must name each shard set once; add up the weights of the same one")
    return tuple(sets)


Shards = Annotated[str | tuple[WeightedShards, ...], BeforeValidator(_parse_shards)]
"""A shard set, or several with weights."""


def shard_urls(shards: Shards) -> list[str]:
    """The folders or URLs of the shard sets."""
    return [shards] if isinstance(shards, str) else [weighted.shards for weighted in shards]


def mixture_weights(shards: Shards) -> list[float]:
    """The fraction of the clips that each shard set gives; they add up to 1."""
    if isinstance(shards, str):
        return [1.0]
    total = sum(weighted.weight for weighted in shards)
    return [weighted.weight / total for weighted in shards]


class DataSection(Section):
    """The clips and how they are dealt out."""

    shards: Shards
    """The shard set to train on: a folder (a relative path starts at the working folder), or far away, s3://, gs:// or
    http(s):// and what comes before the files' names, or pipe: and a command with {file} in place of the name. Or a
    list with weights, [{shards: SET, weight: 3}, {shards: SET, weight: 1}], by which clips are drawn from the sets."""
    autoencoder: str
    """Name of the autoencoder whose latents the shard set must hold."""
    latent_shape: Annotated[tuple[Count, Count, Count], Field(strict=False)]
    """Shape [C, H, W] of a frame latent."""
    frames: FrameCounts = 16
    """Frames of a clip: as many, or drawn from a range [16, 300] or by weights {16: 3, 64: 1}; at most model.window
    without context. A shorter video gives what it has, if that is the fewest at least."""
    frame_stride: Count = 1
    """Take every n-th frame of a video for a clip."""
    lanes: Count = 8
    """Sample streams; a global batch is one pack from every lane, and the ranks must divide the lanes. A run that has
    checkpoints takes another number with --accept-changes."""
    clips_per_pack: Count | None = 4
    """Clips in a pack; lanes x clips_per_pack is the global batch. Null where tokens_per_pack is set."""
    tokens_per_pack: Count | None = None
    """In place of clips_per_pack: the most tokens of a pack, which takes as many clips as fill it best."""
    shuffle_window: Count = 256
    """Samples among which a lane shuffles; 1 keeps the shards' order."""
    scaling: Literal["factor", "channel"] = "factor"
    """Scale latents by the autoencoder's one factor (as officially) or to mean 0 and deviation 1 per channel."""
    prefetch: Count = 2
    """Steps whose packs are read ahead of the model."""
    cache_dir: str | None = None
    """Folder on each node's own disk for what is remote, or compressed as MDS shards may be; its ranks share it. Other
    sets need none."""
    stage_local: str | None = None
    """Folder on each node's own disk to which the shards of local sets (on Lustre or NFS) are copied as they are read,
    so that later epochs read nothing from the source; may be data.cache_dir. Null reads them where they lie."""
    cache_gb: Annotated[float, Field(gt=0)] = 200.0
    """The most that data.cache_dir holds, in GB (10^9 bytes), what was read longest ago goes first; and the most that
    data.stage_local holds, what does not fit is read where it lies."""
    prefetch_gb: Annotated[float, Field(ge=0)] = 4.0
    """GB of shards that a rank has in data.cache_dir or data.stage_local before its lanes come to them; 0 fetches each
    when needed."""
    max_damaged_samples: Annotated[int, Field(ge=0)] = 0
    """Clips of damaged samples that a stage may leave out, each told in events.jsonl; one more ends the run."""

    @property
    def prefetch_bytes(self) -> int:
        """data.prefetch_gb in bytes."""
        return int(self.prefetch_gb * 1e9)

    @property
    def cache_bytes(self) -> int:
        """data.cache_gb in bytes."""
        return int(self.cache_gb * 1e9)

    @model_validator(mode="before")
    @classmethod
    def _tokens_in_place_of_clips(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tokens_per_pack") is not None:
            return {"clips_per_pack": None, **values}
        return values


class StageSection(Section):
    """One stage of a curriculum; what it does not give is as in data and model."""

    steps: Count
    """Optimizer steps of this stage."""
    name: str | None = None
    """What the log calls it; null for stage-1, stage-2, ..."""
    frames: FrameCounts | None = None
    """In place of data.frames."""
    clips_per_pack: Count | None = None
    """In place of data.clips_per_pack or data.tokens_per_pack."""
    tokens_per_pack: Count | None = None
    """In place of data.tokens_per_pack or data.clips_per_pack."""
    window: Count | None = None
    """In place of model.window."""
    shards: Shards | None = None
    """In place of data.shards; latents are scaled by the numbers of data.shards all the same."""
    latent_shape: Annotated[tuple[Count, Count, Count], Field(strict=False)] | None = None
    """In place of data.latent_shape, where the stage's shard set has another resolution."""
    learning_rate_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate that the optimizer section gives."""


class ObjectiveSection(Section):
    """Flow matching."""

    timesteps: Literal["logit_normal", "uniform"] = "logit_normal"
    """How the timestep of a noisy frame is drawn."""
    logit_mean: float = 0.0
    """Mean of the normal draw whose sigmoid u gives the timestep 1000 (1 - u): lower is noisier (logit_normal)."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """Deviation of that normal draw (logit_normal)."""
    clean_frame_ratio: Fraction = 0.1
    """Probability that a frame is given without noise, and so without loss."""
    context_noise: Fraction = 0.0
    """Share of noise s in such a clean frame of the window, which is then given as noise level 1000 s, still without
    loss, against drift in long roll-outs; coarse context stays clean."""


class OptimizerSection(Section):
    """AdamW, its learning rate over the steps, and the EMA of the weights."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term that keeps its division finite."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is scaled down to this global norm where it is larger."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or a half cosine down to final_factor at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps over which the learning rate rises from 0 in a straight line; 0 for none."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where cosine ends, as a fraction of learning_rate."""
    ema_decay: Fraction
    """Decay of the exponential moving average of the weights, each step."""


def _parse_hpz(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise PydanticCustomError("hpz", "must be auto or a number of ranks, at least 1")
    return value


def _parse_reduce_once(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise PydanticCustomError("reduce_once", "must be auto, true or false")
    return value


def _parse_size(value: Any) -> Any:
    """Configurations of DeepSpeed write 5e8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, Field(ge=0), BeforeValidator(_parse_size)]
"""How many numbers."""
PositiveSize = Annotated[int, Field(ge=1), BeforeValidator(_parse_size)]


class OffloadSection(Section):
    """Where DeepSpeed keeps something beside the GPU's memory."""

    device: Literal["cpu"]
    """The node's main memory. Not NVMe: EMA and checkpoints read the tensors where they lie."""
    pin_memory: bool = True
    """Lock these pages in memory, for fast copies to the GPU; false where a limit of the node forbids it."""


class DeepSpeedSection(Section):
    """Keys of DeepSpeed's zero_optimization, under DeepSpeed's own names: how the ranks communicate. Null leaves a key
    at DeepSpeed's default. Keys that are missing here are set by other keys of the recipe."""

    zero_hpz_partition_size: Annotated[int | Literal["auto"], BeforeValidator(_parse_hpz)] = "auto"
    """ZeRO-3: ranks, counted from rank 0, that keep one more copy of the weights among them after a forward pass, so
    that backward gathers within them alone (hpZ). Auto: the ranks of a node where there are several nodes and up to
    1.4 billion parameters; else 1, which is without."""
    zero_quantized_weights: bool | None = None
    """ZeRO-3 on GPUs: gather weights as int8 (ZeRO++). Changes the result."""
    zero_quantized_gradients: bool | None = None
    """ZeRO-3 on GPUs: reduce gradients as int4 (ZeRO++). Changes the result."""
    communication_data_type: Literal["fp32", "bf16"] | None = None
    """Type that gradients are reduced in; null for that of train.precision. Changes the result."""
    overlap_comm: bool | None = None
    """Reduce gradients during backward; null for true on GPUs and false on CPUs."""
    reduce_bucket_size: PositiveSize | None = None
    """Numbers that are reduced at a time; DeepSpeed's default is 5e8."""
    reduce_scatter: bool | None = None
    """ZeRO-2 and -3: reduce to the rank that owns a part, not to all."""
    allgather_bucket_size: Annotated[PositiveSize, Field(multiple_of=2)] | None = None
    """ZeRO-1 and -2: numbers that are gathered at a time after a step, an even number; DeepSpeed's default is 5e8."""
    allgather_partitions: bool | None = None
    """ZeRO-1 and -2: gather the updated weights by all-gather, not by broadcasts."""
    use_multi_rank_bucket_allreduce: bool | None = None
    """ZeRO-1 and -2: reduce buckets of several ranks in one all-reduce."""
    sub_group_size: PositiveSize | None = None
    """ZeRO-3: parameters that the optimizer steps at a time; DeepSpeed's default is 1e9."""
    stage3_prefetch_bucket_size: Size | None = None
    """ZeRO-3: numbers that are gathered ahead of use; DeepSpeed's default is 5e7."""
    stage3_max_live_parameters: Size | None = None
    """ZeRO-3: the most gathered parameters that a rank holds at a time; DeepSpeed's default is 1e9."""
    stage3_max_reuse_distance: Size | None = None
    """ZeRO-3: keep gathered a parameter that is needed again within so many; DeepSpeed's default is 1e9."""
    stage3_model_persistence_threshold: Size | None = None
    """ZeRO-3: the most numbers that train.whole_below keeps whole in all."""
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    """ZeRO-3: gather by all-reduce, which spares copies on the host and sends twice as much."""
    stage3_allgather_sequential: bool | None = None
    """ZeRO-3: gather parameters one by one, without a buffer for several."""
    log_trace_cache_warnings: bool | None = None
    """ZeRO-3: warn where the order in which layers are used changes, which costs a new trace of it."""
    enable_sanity_checks: bool | None = None
    """ZeRO-3: check DeepSpeed's own bookkeeping at every gather, to look for a bug."""
    offload_optimizer: OffloadSection | None = None
    """ZeRO-3: keep master weights, moments and EMA in main memory and step there, by torch's AdamW. Each step then
    waits for the copies."""
    offload_param: OffloadSection | None = None
    """ZeRO-3: keep this rank's part of the weights in main memory between uses."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys_set_elsewhere(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name in SET_ELSEWHERE:
                context = {"key": f"train.deepspeed.{name}", "problem": SET_ELSEWHERE[name]}
                raise PydanticCustomError("set_elsewhere", "{problem}", context)
        return values

    def given(self) -> dict[str, Any]:
        """The keys that the recipe sets, but for an automatic zero_hpz_partition_size."""
        return {name: value for name, value in self.model_dump().items() if value is not None and value != "auto"}

    def of_result(self) -> dict[str, Any]:
        """Those that change the trained weights beyond rounding."""
        names = ("zero_quantized_weights", "zero_quantized_gradients", "communication_data_type")
        return {name: value for name, value in self.given().items() if name in names and value is not False}


class TrainSection(Section):
    """How long and how to compute."""

    steps: Count
    """Optimizer steps, each on one global batch; with a curriculum the sum of its stages, unless set."""
    precision: Literal["bf16", "fp32"]
    """Arithmetic of the model; optimizer and EMA are float32 in either."""
    zero_stage: Literal[0, 1, 2, 3, "auto"]
    """DeepSpeed ZeRO stage: shards nothing, the optimizer, also gradients, also weights; auto: the lowest from 1 that
    fits the memory by estimate, chosen at each start."""
    whole_below: Annotated[int, Field(ge=0)] = 100_000
    """ZeRO-3 keeps parameters of fewer numbers than this whole on every rank, to spare small gathers; 0 shards all."""
    reduce_once: Annotated[bool | Literal["auto"], BeforeValidator(_parse_reduce_once)] = "auto"
    """ZeRO-2 and -3 where a rank has several packs a step: sum their gradients first and reduce them once, which keeps
    whole gradients on every rank; false reduces each pack's while the next is computed. Auto: where there are several
    nodes and the memory is there."""
    activation_checkpointing: Literal["none", "attention-kept", "full"] = "none"
    """What backward computes again in place of keeping it: nothing, all of a layer but attention's output (which is
    what takes longest), or all of a layer, of which then only the input is kept. FlexAttention's output is not kept."""
    compile: bool = False
    """Compile the layers by torch.compile, one graph for all of them, made in the first steps; needs a C++ compiler."""
    attention: str = "auto"
    """Attention kernel: auto, or a name from `python -m far_scale.model.attention`."""
    start_from: str | None = None
    """Model directory whose weights a new run starts from, such as an imported official model; null for random ones."""
    deepspeed: DeepSpeedSection | None = None
    """DeepSpeed's own keys, for a cluster's network; null for their defaults."""


class CheckpointSection(Section):
    """Checkpoints under run_dir."""

    every: Count
    """Steps between checkpoints; the last step always writes one."""
    keep: Count
    """How many of the newest checkpoints stay."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Minutes after the last checkpoint at which another is written, so that a crash costs no more however long the
    steps take. It stays only until the next one, and is not among those of keep. Null for none."""
    local_dir: str | None = None
    """Folder on each node's own disk for checkpoints beside these, cheaper and more frequent, that a restart with the
    same ranks on the same nodes goes on from where they are newer; null for none."""
    local_every: Count = 100
    """Steps between checkpoints in local_dir."""


class FaultsSection(Section):
    """What a run does when something goes wrong."""

    watchdog_seconds: Annotated[float, Field(ge=0)] = 1800.0
    """A run that ends no step for so long writes all ranks' Python stacks and ends, to be started again; 0: never."""
    skipped_in_row: Count = 5
    """Steps skipped in a row after which the run takes its last checkpoint's weights and goes on past these batches."""
    spikes: Literal["off", "warn", "skip"] = "warn"
    """What to do about a step whose loss or gradient norm is a spike; one that is not finite is always skipped."""
    spike_deviations: Annotated[float, Field(gt=0)] = 10.0
    """A spike lies as many robust deviations above the running median (the last 128 steps)."""
    starts_without_progress: Count = 3
    """Restarts in a row that reach no new checkpoint, after which the job stops and says so."""


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """Whether to log there at all, only into files, or live."""
    project: str = "far_scale"
    """The project to log into."""
    name: str | None = None
    """The run's name there; null takes the recipe's name."""


class LogSection(Section):
    """Console and log.jsonl."""

    every: Count
    """Steps between lines."""
    wandb: WandbSection = WandbSection()


class SampleSection(Section):
    """Evaluation by sampling after training."""

    steps: Count
    """Euler steps a frame."""
    guidance: Annotated[float, AfterValidator(valid_guidance)]
    """Classifier-free guidance scale; 1 is without, -1 takes the null class alone."""
    given: Annotated[int, Field(ge=0)]
    """True frames that are given; those after are predicted. 0 generates from nothing."""
    frames: Count | None = None
    """Frames to predict; null for up to the longest clip of data.frames."""
    context_noise: Fraction = 0.0
    """Share of noise s in the frames of the window that a new frame follows, given as noise level 1000 s; coarse
    context stays clean. For models trained with objective.context_noise, or without clean frames."""
    shards: str | None = None
    """Folder of the held-out shard set, on this machine; null for none. Validation reads it, too."""


class ValidationSection(Section):
    """Validation while training, on held-out clips; without this section there is none. It changes no weights."""

    every: Count
    """Steps between losses on the held-out clips, at fixed noise and timesteps, of the weights and of the EMA; the last
    step always has them."""
    shards: Annotated[str, Field(min_length=1)] | None = None
    """Folder or URL of the held-out shard set; null for sample.shards."""
    clips: Count = 64
    """Held-out clips: the first ones of the set, each from its first frame."""
    clips_per_pack: Count = 8
    """Of these in a pack. No gradients are kept, so that more fit than in training."""
    sample_every: Count | None = None
    """Steps between sampled videos of the EMA, with PSNR, SSIM and LPIPS, by the sample section; null for none."""
    sample_clips: Count = 4
    """Clips to sample: the first ones of the set, shared out over the ranks."""
