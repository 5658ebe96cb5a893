"""The sections of a recipe: every key with its type, limits, default and meaning.

`python -m far_scale.recipe` and docs/config.md print the text under each key.
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
    """Validate a scale of classifier-free guidance."""
    if value < 1 and value != -1:
        raise PydanticCustomError("guidance", "must be at least 1, or -1 for only the null class")
    return value


Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Grid = Literal["official", "even"]


class Section(BaseModel):
    """Base of all sections: refuses unknown keys, and is immutable."""

    # strict: no "8" for 8 and no true for 1; an int is still accepted for a float.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """Size and condition of the model."""

    preset: Literal["B", "M", "L", "XL", "1.3B", "3B", "7B"] | None = None
    """Model size, which sets layers and heads unless they are given. B to XL are the official sizes."""
    layers: Count
    """Transformer layers; default: those of model.preset."""
    heads: Count
    """Attention heads of dimension 64, so the width is 64 x heads; default: those of model.preset."""
    patch: Count = 1
    """Patch size of window frames: a token is a patch x patch square of latent positions."""
    context_patch: Annotated[int, Field(ge=0)] = 0
    """Patch size of context frames, a multiple of model.patch; 0 for a model without context."""
    channels: Count = 32
    """Channels of a frame latent."""
    window: Count = 16
    """Number of window frames: the last frames of a clip. Earlier ones are context."""
    causal: bool = True
    """Whether a frame attends only to itself and earlier frames. False makes a video diffusion transformer: all frames
    of a clip attend to each other, share one timestep and are sampled together; needs objective.clean_frame_ratio 0."""
    condition: Literal["none", "label", "action"] = "none"
    """Condition of the model: none, a label per clip or an action per frame."""
    classes: Annotated[int, Field(ge=0)] = 0
    """Number of labels or actions; 0 without a condition."""
    condition_dropout: Fraction = 0.1
    """Probability that training replaces a condition by the null class; guidance needs it above 0."""

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
    """One shard set of a mixture."""

    shards: Annotated[str, Field(min_length=1)]
    """Folder or URL of the shard set."""
    weight: Annotated[float, Field(gt=0)]
    """Its part of the clips, relative to the weights of the other sets."""


def _parse_shards(value: Any) -> Any:
    """Parse a folder or a list of weighted sets."""
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
    """The fraction of the clips that comes from each shard set; they sum to 1."""
    if isinstance(shards, str):
        return [1.0]
    total = sum(weighted.weight for weighted in shards)
    return [weighted.weight / total for weighted in shards]


class DataSection(Section):
    """The clips: where they come from, and how they are read and packed."""

    shards: Shards
    """Shard set to train on: a folder (a relative path starts at the working folder); a remote URL prefix, s3://, gs://
    or http(s)://; or pipe: and a command with {file} for the file's name. For a mixture, a list with weights:
    [{shards: SET, weight: 3}, {shards: SET, weight: 1}]."""
    autoencoder: str
    """Name of the autoencoder that encoded the shard set."""
    latent_shape: Annotated[tuple[Count, Count, Count], Field(strict=False)]
    """Shape [C, H, W] of a frame latent."""
    frames: FrameCounts = 16
    """Frames of a clip: a number, a range [16, 300] or weights {16: 3, 64: 1} to draw from; without context at most
    model.window. A shorter video gives all its frames, if they are at least the smallest number."""
    frame_stride: Count = 1
    """A clip takes every n-th frame of a video."""
    lanes: Count = 8
    """Sample streams: a global batch is one pack from every lane. The number of ranks must divide it. A run with
    checkpoints can change it with --accept-changes."""
    clips_per_pack: Count | None = 4
    """Clips in a pack; the global batch is lanes x clips_per_pack. Null if tokens_per_pack is set."""
    tokens_per_pack: Count | None = None
    """Token budget of a pack, which is filled with as many clips as fit; replaces clips_per_pack."""
    shuffle_window: Count = 256
    """Size of a lane's shuffle window, in samples; 1 keeps the order of the shards."""
    scaling: Literal["factor", "channel", "start"] = "factor"
    """Scale latents by the autoencoder's one factor (as the official FAR), each channel to mean 0 and std 1, or as the
    model in train.start_from (start), which a fine-tuned model should keep."""
    prefetch: Count = 2
    """Steps of packs to read ahead."""
    cache_dir: str | None = None
    """Cache folder on each node's own disk, shared by its ranks; needed for remote and for compressed (MDS) shards."""
    stage_local: str | None = None
    """Folder on each node's own disk to which shards on a shared file system (Lustre, NFS) are copied as they are
    read, so that later epochs read only the copies; may be data.cache_dir. Null reads them from the source."""
    cache_gb: Annotated[float, Field(gt=0)] = 200.0
    """Size limit in GB (10^9 bytes) of data.cache_dir, which evicts the least recently read, and of data.stage_local,
    which leaves what does not fit at the source."""
    prefetch_gb: Annotated[float, Field(ge=0)] = 4.0
    """GB of shards that a rank fetches ahead into data.cache_dir or data.stage_local; 0 fetches each on demand."""
    max_damaged_samples: Annotated[int, Field(ge=0)] = 0
    """Clips with damaged samples that a stage may skip, each logged in events.jsonl; one more ends the run."""

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
    def _clear_clips_for_tokens(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tokens_per_pack") is not None:
            return {"clips_per_pack": None, **values}
        return values


class StageSection(Section):
    """One stage of a curriculum; keys that it does not set are taken from data and model."""

    steps: Count
    """Optimizer steps of this stage."""
    name: str | None = None
    """Name in the log; null for stage-1, stage-2, ..."""
    frames: FrameCounts | None = None
    """Overrides data.frames."""
    clips_per_pack: Count | None = None
    """Overrides data.clips_per_pack and data.tokens_per_pack."""
    tokens_per_pack: Count | None = None
    """Overrides data.tokens_per_pack and data.clips_per_pack."""
    window: Count | None = None
    """Overrides model.window."""
    shards: Shards | None = None
    """Overrides data.shards; latents are still scaled by the statistics of data.shards."""
    latent_shape: Annotated[tuple[Count, Count, Count], Field(strict=False)] | None = None
    """Overrides data.latent_shape, for a shard set of another resolution."""
    learning_rate_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on optimizer.learning_rate."""


class ObjectiveSection(Section):
    """Flow matching."""

    timesteps: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of a noisy frame's timestep."""
    logit_mean: float = 0.0
    """logit_normal: mean of the normal variable z in timestep = 1000 (1 - sigmoid(z)); lower is noisier."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """logit_normal: standard deviation of z."""
    clean_frame_ratio: Fraction = 0.1
    """Probability that a frame is given clean: without noise, and so without loss."""
    context_noise: Fraction = 0.0
    """Fraction s of noise added to clean window frames, which then have timestep 1000 s and still no loss. It reduces
    drift in long roll-outs. Context frames stay clean."""


class OptimizerSection(Section):
    """AdamW, its learning rate schedule, and the EMA of the weights."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or cosine decay to final_factor at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up from 0."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final learning rate of cosine, as a fraction of learning_rate."""
    ema_decay: Fraction
    """Decay per step of the exponential moving average (EMA) of the weights."""


def _parse_hpz(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise PydanticCustomError("hpz", "must be auto or a number of ranks, at least 1")
    return value


def _parse_reduce_once(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise PydanticCustomError("reduce_once", "must be auto, true or false")
    return value


def _parse_size(value: Any) -> Any:
    """Accept whole floats: DeepSpeed configurations have 5e8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, Field(ge=0), BeforeValidator(_parse_size)]
"""A number of elements."""
PositiveSize = Annotated[int, Field(ge=1), BeforeValidator(_parse_size)]


class OffloadSection(Section):
    """Offload of DeepSpeed's state from the GPU's memory."""

    device: Literal["cpu"]
    """The node's main memory. NVMe is not supported: EMA and checkpoints read the tensors in memory."""
    pin_memory: bool = True
    """Pin the memory, for fast copies to the GPU; false if the node limits pinned memory."""


class DeepSpeedSection(Section):
    """How the ranks communicate: keys of DeepSpeed's zero_optimization, under their own names. Null keeps DeepSpeed's
    default. Other keys of the recipe set the keys that are missing here."""

    zero_hpz_partition_size: Annotated[int | Literal["auto"], BeforeValidator(_parse_hpz)] = "auto"
    """ZeRO-3: hpZ group size. Each group of consecutive ranks keeps a second copy of the weights after forward, so that
    backward gathers only within the group. 1 is off. Auto: the ranks of a node if there are several nodes and at most
    1.4 billion parameters, else 1."""
    zero_quantized_weights: bool | None = None
    """ZeRO-3 on GPUs: gather weights as int8 (ZeRO++). Changes the result."""
    zero_quantized_gradients: bool | None = None
    """ZeRO-3 on GPUs: reduce gradients as int4 (ZeRO++). Changes the result."""
    communication_data_type: Literal["fp32", "bf16"] | None = None
    """Data type of gradient reduction; null for that of train.precision. Changes the result."""
    overlap_comm: bool | None = None
    """Reduce gradients during backward; null for true on GPUs and false on CPUs."""
    reduce_bucket_size: PositiveSize | None = None
    """Elements reduced at a time; DeepSpeed's default is 5e8."""
    reduce_scatter: bool | None = None
    """ZeRO-2 and -3: reduce-scatter gradients, not all-reduce."""
    allgather_bucket_size: Annotated[PositiveSize, Field(multiple_of=2)] | None = None
    """ZeRO-1 and -2: elements gathered at a time after a step; DeepSpeed's default is 5e8."""
    allgather_partitions: bool | None = None
    """ZeRO-1 and -2: collect the updated weights by all-gather, not by broadcasts."""
    use_multi_rank_bucket_allreduce: bool | None = None
    """ZeRO-1 and -2: reduce buckets of several ranks in one all-reduce."""
    sub_group_size: PositiveSize | None = None
    """ZeRO-3: elements that the optimizer updates at a time; DeepSpeed's default is 1e9."""
    stage3_prefetch_bucket_size: Size | None = None
    """ZeRO-3: elements gathered ahead of their use; DeepSpeed's default is 5e7."""
    stage3_max_live_parameters: Size | None = None
    """ZeRO-3: maximum of gathered elements on a rank at a time; DeepSpeed's default is 1e9."""
    stage3_max_reuse_distance: Size | None = None
    """ZeRO-3: keep a gathered parameter that is used again within this many elements; DeepSpeed's default is 1e9."""
    stage3_model_persistence_threshold: Size | None = None
    """ZeRO-3: maximum of elements that train.whole_below keeps unsharded in total."""
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    """ZeRO-3: gather by all-reduce, which saves host copies and sends twice as much."""
    stage3_allgather_sequential: bool | None = None
    """ZeRO-3: gather parameters one by one, without a common buffer."""
    log_trace_cache_warnings: bool | None = None
    """ZeRO-3: warn if the order of the layers changes, which costs a new trace."""
    enable_sanity_checks: bool | None = None
    """ZeRO-3: check DeepSpeed's bookkeeping at every gather, for debugging."""
    offload_optimizer: OffloadSection | None = None
    """ZeRO-3: keep master weights, moments and EMA in main memory and update them there with torch's AdamW. Each step
    then waits for the copies."""
    offload_param: OffloadSection | None = None
    """ZeRO-3: keep this rank's shard of the weights in main memory between uses."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys_set_elsewhere(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name in SET_ELSEWHERE:
                context = {"key": f"train.deepspeed.{name}", "problem": SET_ELSEWHERE[name]}
                raise PydanticCustomError("set_elsewhere", "{problem}", context)
        return values

    def explicit_values(self) -> dict[str, Any]:
        """The keys that the recipe sets, without an automatic zero_hpz_partition_size."""
        return {name: value for name, value in self.model_dump().items() if value is not None and value != "auto"}

    def result_values(self) -> dict[str, Any]:
        """The explicit values that change the trained weights beyond rounding."""
        names = ("zero_quantized_weights", "zero_quantized_gradients", "communication_data_type")
        return {name: value for name, value in self.explicit_values().items() if name in names and value is not False}


class TrainSection(Section):
    """Length of the training, and how it computes."""

    steps: Count
    """Optimizer steps, each on one global batch; null for the sum of the curriculum's stages."""
    precision: Literal["bf16", "fp32"]
    """Precision of the model; optimizer and EMA are always float32."""
    zero_stage: Literal[0, 1, 2, 3, "auto"]
    """ZeRO stage of DeepSpeed: 0 shards nothing, 1 the optimizer, 2 also gradients, 3 also weights. Auto: the lowest
    from 1 that fits the memory by estimate, chosen at each start."""
    whole_below: Annotated[int, Field(ge=0)] = 100_000
    """ZeRO-3 keeps parameters with fewer elements unsharded, to avoid small gathers; 0 shards all."""
    reduce_once: Annotated[bool | Literal["auto"], BeforeValidator(_parse_reduce_once)] = "auto"
    """ZeRO-2 and -3 with several packs per rank and step: sum the gradients of the packs and reduce them once, which
    keeps unsharded gradients on every rank. False reduces those of each pack while the next one is computed. Auto: true
    if there are several nodes and enough memory."""
    sequence_parallel: Count = 1
    """Consecutive ranks that share each pack: each holds some of its frames, and in attention some of the heads. For
    more ranks than data.lanes, or for packs too long for one GPU. It must divide the ranks, and the ranks divided by it
    must divide data.lanes. At most model.heads; it should divide the GPUs of a node."""
    activation_checkpointing: Literal["none", "attention-kept", "full"] = "none"
    """What backward recomputes: nothing; all of a layer except the output of attention, the slowest part; or all of a
    layer. FlexAttention's output is always recomputed."""
    compile: bool = False
    """Compile the layers with torch.compile: one graph for all, in the first steps; needs a C++ compiler."""
    attention: str = "auto"
    """Attention kernel: auto, or a name that `python -m far_scale.model.attention` lists."""
    start_from: str | None = None
    """Model directory with a new run's initial weights, such as an imported official model; null for random ones. A
    model with context can start from one without; its context weights then start as copies of the window's."""
    deepspeed: DeepSpeedSection | None = None
    """Keys of DeepSpeed, to tune communication; null for their defaults."""


class CheckpointSection(Section):
    """Checkpoints under run_dir."""

    every: Count
    """Steps between checkpoints; the last step always writes one."""
    keep: Count
    """Number of checkpoints to keep, the newest ones."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Maximum minutes between checkpoints, which limits what a crash costs if steps are slow. Such a checkpoint is
    deleted after the next one and does not count for keep. Null for no limit."""
    local_dir: str | None = None
    """Folder on each node's own disk for additional checkpoints, cheaper and more frequent. A restart with the same
    ranks on the same nodes resumes from them if they are newer. Null for none."""
    local_every: Count = 100
    """Steps between checkpoints in local_dir."""


class FaultsSection(Section):
    """Handling of faults."""

    watchdog_seconds: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds without a step until the run writes all ranks' Python stacks and exits, to be restarted; 0: never."""
    skipped_in_row: Count = 5
    """Consecutive skipped steps after which the run reloads its last checkpoint and continues after these batches."""
    spikes: Literal["off", "warn", "skip"] = "warn"
    """What to do with a spike in loss or gradient norm. Steps that are not finite are always skipped."""
    spike_deviations: Annotated[float, Field(gt=0)] = 10.0
    """A spike is this many robust standard deviations above the median of the last 128 steps."""
    starts_without_progress: Count = 3
    """Consecutive starts without a new checkpoint after which the job stops with an error."""


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """Off, into files only, or live."""
    project: str = "far_scale"
    """Project of the run."""
    name: str | None = None
    """Name of the run; null for the recipe's name."""


class LogSection(Section):
    """Log lines on the console and in log.jsonl."""

    every: Count
    """Steps between log lines."""
    tensorboard: bool = False
    """Also write the numbers as TensorBoard's event files into run_dir/tensorboard."""
    wandb: WandbSection = WandbSection()


class SampleSection(Section):
    """Sampling after training and in validation."""

    steps: Count
    """Euler steps per frame."""
    guidance: Annotated[float, AfterValidator(valid_guidance)]
    """Scale of classifier-free guidance: 1 is without guidance, -1 uses only the null class."""
    given: Annotated[int, Field(ge=0)]
    """Ground-truth frames that are given; the frames after them are predicted. 0 generates without any."""
    frames: Count | None = None
    """Frames to predict; null for the rest of the longest clip of data.frames."""
    context_noise: Fraction = 0.0
    """Fraction s of noise added to the finished window frames, which then have timestep 1000 s; context frames stay
    clean. For models trained with objective.context_noise, or without clean frames."""
    grid: Grid = "official"
    """Noise levels of the Euler steps: official, from 1 to 1/1000, then 0, as in the official code, so that the last
    step has almost no effect; or even, from 1 to 0 in equal parts, better for few steps."""
    window_stride: Count = 1
    """Frames by which a full window slides. It is encoded again each time, so half the window is several times as fast
    as 1; new frames see fewer fine frames."""
    context_frames: Annotated[int, Field(ge=0)] | None = None
    """Maximum coarse context frames while sampling, of which the oldest are dropped; null for no maximum."""
    shards: str | None = None
    """Folder of the held-out shard set, also used by validation; null for none."""


class ValidationSection(Section):
    """Validation during training on held-out clips; null for none. It does not change the weights."""

    every: Count
    """Steps between validation losses of the weights and of the EMA, at fixed noise and timesteps; the last step always
    has them."""
    shards: Annotated[str, Field(min_length=1)] | None = None
    """Folder or URL of the held-out shard set; null for sample.shards."""
    clips: Count = 64
    """Held-out clips: the first of the set, each from its first frame."""
    clips_per_pack: Count = 8
    """Held-out clips in a pack. Without gradients more fit than in training."""
    sample_every: Count | None = None
    """Steps between videos sampled with the EMA, scored by PSNR, SSIM and LPIPS; null for none."""
    sample_clips: Count = 4
    """Clips to sample: the first of the set, distributed over the ranks."""
