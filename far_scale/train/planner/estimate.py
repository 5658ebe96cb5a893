"""The plan of a run: shapes, memory, time, traffic and disk of each stage, for ranks that need not exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from far_scale.config.recipe import Recipe
from far_scale.data.loader.mixture import Mixture
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.ledger import Entry
from far_scale.distributed.sequence_parallel import describe_groups
from far_scale.model import FARConfig
from far_scale.model.attention import flex as flex_attention
from far_scale.train.collectives import model_shapes, step_entries, unknown_key
from far_scale.train.curriculum import stages
from far_scale.train.planner.memory import Counts, RankMemory, activation_bytes
from far_scale.train.planner.profile import Profile, Settings, newest_profile
from far_scale.train.planner.shapes import StageShapes, draw_stages
from far_scale.train.planner.time_model import Work, pack_work, predict_seconds, scaled_work, sum_work, update_work
from far_scale.train.sharding import USABLE_FRACTION, Sharding, sharding_on, state_bytes

GPU_BYTES = {"a100": 80e9, "h100": 80e9, "h200": 141e9}
"""Memory by GPU, from the vendors' data sheets (the A100 of 80 GB). What a device has beyond these decimal gigabytes is
left to CUDA and NCCL."""

_CHECKPOINT_BYTES = 16
"""For each parameter: float32 weights, Adam's two moments and the EMA."""
_STORED_NUMBER = {"float32": 4}
"""Bytes of a number of a shard set's latents; bfloat16 and float16 have 2."""


@dataclass(frozen=True)
class Cluster:
    """The ranks of a run.

    Attributes:
        nodes: their number.
        per_node: ranks of each.
        device: short name of the ranks' GPU; `cpu` without one.
        memory: bytes of a rank's device that are free before the run.
    """

    nodes: int
    per_node: int
    device: str
    memory: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def hosts(self) -> list[str]:
        """A name of its host for each rank."""
        return [f"node {node + 1}" for node in range(self.nodes) for _ in range(self.per_node)]


@dataclass(frozen=True)
class StagePlan:
    """A stage.

    Attributes:
        shapes: its packs.
        memory: of a rank, with the largest pack.
        work: of a rank in a mean step.
        bytes_read: of latents in a mean step, all ranks together.
        seconds: of a mean step by what takes them: compute, links and data; empty without a profile.
    """

    shapes: StageShapes
    memory: RankMemory
    work: Work
    bytes_read: float
    seconds: Mapping[str, float]

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a mean step, whose data is read beside it; None without a profile."""
        if not self.seconds:
            return None
        return max(self.seconds["compute"] + self.seconds["links"], self.seconds["data"])


@dataclass(frozen=True)
class RunPlan:
    """A run.

    Attributes:
        title: name and hash of the recipe.
        cluster: the ranks.
        packs: of a rank in a step.
        config: the model's shape.
        parameters: their number.
        precision: as in train.precision.
        flex: whether attention is FlexAttention.
        sharding: how weights, gradients and optimizer are sharded.
        groups: lines on the ranks that share packs; none where each has its own.
        stages: in order.
        traffic: the collectives of a step, of a rank.
        unknown_traffic: the key for which they are not known; None otherwise.
        checkpoints_kept: checkpoint.keep and the one that is written between two of these.
        profile: gives the seconds, or None.
        profile_line: names it, or says how to get one.
    """

    title: str
    cluster: Cluster
    packs: int
    config: FARConfig
    parameters: int
    precision: str
    flex: bool
    sharding: Sharding
    groups: Sequence[str]
    stages: Sequence[StagePlan]
    traffic: Sequence[Entry]
    unknown_traffic: str | None
    checkpoints_kept: int
    profile: Profile | None
    profile_line: str

    @property
    def peak(self) -> int:
        """Bytes that a rank needs at most."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def usable(self) -> float:
        """Bytes of a rank's device that a plan may fill; the rest is the margin."""
        return USABLE_FRACTION * self.cluster.memory

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def seconds(self) -> float | None:
        """Of all steps; None without a profile."""
        each = [(stage.step_seconds, stage.shapes.stage.steps) for stage in self.stages]
        return sum(seconds * steps for seconds, steps in each if seconds is not None) if self.profile else None

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint."""
        return _CHECKPOINT_BYTES * self.parameters

    @property
    def between(self) -> float:
        """Bytes that a rank sends to other nodes in a step."""
        return sum(entry.between for entry in self.traffic)

    @property
    def knows_links(self) -> bool:
        """Whether the profile has measured links like those of the run."""
        needed = ["within"] if self.cluster.nodes == 1 else ["within", "between"]
        return self.cluster.ranks == 1 or all(self.profile and name in self.profile.coefficients for name in needed)


def plan_run(
    recipe: Recipe,
    cluster: Cluster,
    sources: Mapping[int, ShardSet | Mixture | None],
    profiles: Path,
    kernel: str | None = None,
    sharding: Sharding | None = None,
    shapes: Sequence[StageShapes] | None = None,
) -> RunPlan:
    """Plan a run.

    Args:
        recipe: what is trained; its lanes can be shared by the ranks.
        cluster: the ranks.
        sources: see `local_sources`.
        profiles: folder of the profiles.
        kernel: of attention; None for that of such a GPU.
        sharding: how the run is sharded; None to choose it for these ranks.
        shapes: the stages' packs, if they are drawn already.

    Raises:
        UserError: the sharding that the recipe asks for is impossible, or a profile cannot be read.
    """
    train, config, ranks = recipe.train, recipe.far_config(), cluster.ranks
    kernel = kernel or (flex_attention.NAME if train.attention == "auto" else train.attention)
    is_flex, shared_by = kernel == flex_attention.NAME, train.sequence_parallel
    packs = recipe.data.lanes * shared_by // ranks
    shapes = shapes or draw_stages(stages(recipe), sources, recipe.seed)
    sizes = model_shapes(config).sizes
    counts = [Counts.of(each.largest, shared_by) for each in shapes]
    activations = [activation_bytes(config, train, each, is_flex, packs) for each in counts]
    if sharding is None:
        sharding = sharding_on(
            train,
            recipe.data.lanes,
            sizes,
            cluster.hosts,
            cluster.memory,
            cluster.device != "cpu",
            lambda: max(activation.total for activation in activations),
        )
    unknown = unknown_key(recipe)
    traffic = [] if unknown or ranks == 1 else step_entries(recipe, sharding, ranks, cluster.nodes)
    settings = Settings(train.precision, train.compile, kernel, sharding.stage)
    profile, profile_line = newest_profile(profiles, cluster.device, settings)
    state = state_bytes(train.precision, sharding, sizes, ranks, train.whole_below, packs)
    update = update_work(sizes, sharding.stage, traffic, ranks)
    planned = []
    for each, activation in zip(shapes, activations, strict=True):
        mode, stage_config = train.activation_checkpointing, each.stage.config
        drawn = sum_work([pack_work(stage_config, layout, mode, is_flex, shared_by) for layout in each.layouts])
        work = sum_work([scaled_work(drawn, packs / len(each.layouts)), update])
        bytes_read = shared_by * _bytes_read(each, sources.get(each.stage.index))  # each rank reads its packs
        seconds = {} if profile is None else _seconds(profile, work, bytes_read / cluster.nodes)
        planned.append(StagePlan(each, RankMemory(state, activation), work, bytes_read, seconds))
    return RunPlan(
        title=f"{recipe.name} ({recipe.hash()[:12]}), {train.steps} steps",
        cluster=cluster,
        packs=packs,
        config=config,
        parameters=sum(sizes),
        precision=train.precision,
        flex=is_flex,
        sharding=sharding,
        groups=describe_groups(shared_by, config.heads, cluster.hosts),
        stages=planned,
        traffic=traffic,
        unknown_traffic=unknown,
        checkpoints_kept=recipe.checkpoint.keep + (recipe.checkpoint.every_minutes is not None),
        profile=profile,
        profile_line=profile_line,
    )


def _bytes_read(shapes: StageShapes, source: ShardSet | Mixture | None) -> float:
    """Bytes of the latents of a mean step, as they are stored; in bfloat16 where the set is not there."""
    sets = [] if source is None else source.sets if isinstance(source, Mixture) else [source]
    number = max((_STORED_NUMBER.get(shard_set.manifest.latent_dtype, 2) for shard_set in sets), default=2)
    channels, height, width = shapes.stage.data.latent_shape
    frames = shapes.stage.data.lanes * shapes.mean(lambda layout: layout.frames)
    return frames * channels * height * width * number


def _seconds(profile: Profile, work: Work, bytes_read: float) -> dict[str, float]:
    """Seconds of a step by what takes them; `bytes_read` on each node."""
    links = {name: value for name, value in profile.coefficients.items() if name in ("within", "between")}
    total, communication = predict_seconds(profile.coefficients, work), predict_seconds(links, work)
    return {"compute": total - communication, "links": communication, "data": bytes_read / profile.disk_read}
