"""The collectives of a run: the expected traffic of a step, and the measured traffic of one step of each stage."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from far_scale.config.recipe import Recipe
from far_scale.data.frame_counts import max_frames
from far_scale.distributed.collective_costs import ModelShapes, ParallelSetup, step_collectives
from far_scale.distributed.ledger import Entry, Ledger, table
from far_scale.distributed.process_group import Processes
from far_scale.distributed.sequence_parallel import exchanges
from far_scale.model import FAR, FARConfig
from far_scale.model.layout import FrameLayout
from far_scale.train.curriculum import Stage, stages
from far_scale.train.deepspeed_adapter import communication_backend
from far_scale.train.sharding import Sharding
from far_scale.utils.event_log import EventLog

_STEADY_STEP = 3
"""The first step after a start in which ZeRO-3 has recorded the order of the modules; later steps are the same."""

# Keys of train.deepspeed that the formula does not cover, with the values that it assumes.
_ASSUMED = {
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
    "stage3_use_all_reduce_for_fetch_params": False,
    "stage3_allgather_sequential": False,
    "stage3_model_persistence_threshold": None,
}


def expected_collectives(recipe: Recipe, sharding: Sharding, ranks: int, nodes: int) -> list[str]:
    """The collectives of a step of `recipe`, as lines of text; none on one rank."""
    if ranks == 1:
        return []
    if (key := unknown_key(recipe)) is not None:
        return [f"collectives: unknown for {key}"]
    lines = table(step_entries(recipe, sharding, ranks, nodes))
    if recipe.train.sequence_parallel > 1:
        lines.append("(all-to-alls as of packs of the longest clips of the last stage)")
    return lines


def step_entries(recipe: Recipe, sharding: Sharding, ranks: int, nodes: int) -> list[Entry]:
    """The collectives of a step of `recipe`, which sets no `unknown_key`."""
    shapes = model_shapes(recipe.far_config())
    return step_collectives(shapes, collective_setup(recipe, sharding, ranks, nodes))


@functools.lru_cache(maxsize=8)
def model_shapes(config: FARConfig) -> ModelShapes:
    """The sizes and the module tree of a model that need not exist."""
    with torch.device("meta"):
        return ModelShapes.from_model(FAR(config))


def unknown_key(recipe: Recipe) -> str | None:
    """A key and value for which the collectives of a step are not known; None without any."""
    given = {} if recipe.train.deepspeed is None else recipe.train.deepspeed.explicit_values()
    for name, value in _ASSUMED.items():
        if given.get(name, value) != value:
            return f"train.deepspeed.{name}={given[name]}"
    return None


def collective_setup(recipe: Recipe, sharding: Sharding, ranks: int, nodes: int) -> ParallelSetup:
    """The inputs of the formula for a run."""
    given = {} if recipe.train.deepspeed is None else recipe.train.deepspeed.explicit_values()
    dtype_bytes = {"bf16": 2, "fp32": 4}
    fields = {  # field of ParallelSetup: DeepSpeed's key
        "reduce_bucket": "reduce_bucket_size",
        "sub_group": "sub_group_size",
        "prefetch_bucket": "stage3_prefetch_bucket_size",
        "reuse_distance": "stage3_max_reuse_distance",
        "live": "stage3_max_live_parameters",
    }
    values = {name: given[key] for name, key in fields.items() if key in given}
    train, shared_by = recipe.train, recipe.train.sequence_parallel
    sent: tuple[tuple[str, int], ...] = ()
    if shared_by > 1:
        sent = tuple(
            exchanges(
                _longest_pack(stages(recipe)[-1]),
                recipe.model.layers,
                recipe.model.heads,
                shared_by,
                lse_numbers=4 // dtype_bytes[train.precision],
                recomputed=train.activation_checkpointing == "full",
            )
        )
    return ParallelSetup(
        ranks=ranks,
        nodes=nodes,
        stage=sharding.stage,
        number_bytes=dtype_bytes[recipe.train.precision],
        gradient_bytes=dtype_bytes[given.get("communication_data_type", recipe.train.precision)],
        packs=recipe.data.lanes * shared_by // ranks,
        reduces_once=sharding.reduce_once,
        hpz=sharding.hpz,
        whole_below=recipe.train.whole_below,
        counts_clips=any(stage.data.tokens_per_pack is not None for stage in recipe.stages()),
        sequence_parallel=shared_by,
        exchanges=sent,
        **values,
    )


def _longest_pack(stage: Stage) -> FrameLayout:
    """The layout of a full pack of the stage's longest clips."""
    longest = max_frames(stage.data.frames)
    clips = stage.data.clips_per_pack or (stage.data.tokens_per_pack or 0) // stage.clip_tokens(longest)
    return stage.layout((longest,) * clips)


class StepLedger:
    """Records the collectives of one step of each stage on the main process, prints them and emits an event.

    It is the third step: nothing is recorded in a shorter stage, nor on one rank. A validation right before it adds
    some gathers.

    Args:
        hosts: every rank's host, by rank.
        processes: the run's.
        events: of this process.
        print_text: prints a text.
    """

    def __init__(
        self, hosts: Sequence[str], processes: Processes, events: EventLog, print_text: Callable[[str], None]
    ) -> None:
        records = processes.is_main_process and processes.world_size > 1
        self._ledger = Ledger(hosts, communication_backend()) if records else None
        self._events, self._print, self._step = events, print_text, 0

    def begin_stage(self, done: int) -> None:
        """Begin or resume a stage after `done` steps of the run."""
        self._step = done + _STEADY_STEP

    @contextlib.contextmanager
    def record(self, step: int) -> Iterator[None]:
        """Around all collectives of step number `step` (from 1); records them if its turn has come."""
        if self._ledger is None or step != self._step:
            yield
            return
        with self._ledger.recording():
            yield
        entries = self._ledger.entries()
        calls, within, between = (
            sum(values) for values in zip(*((e.calls, e.within, e.between) for e in entries), strict=True)
        )
        self._events.emit(
            "collectives",
            step,
            f"step {step}: {calls} collectives, a rank sends {within / 1e6:,.1f} MB in its node and "
            f"{between / 1e6:,.1f} MB to other nodes",
            within=within,
            between=between,
            collectives=[
                {
                    **entry.key._asdict(),
                    "calls": entry.calls,
                    "message_bytes": entry.message_bytes,
                    "within": entry.within,
                    "between": entry.between,
                }
                for entry in entries
            ],
        )
        self._print("\n".join(table(entries)))
