"""The collectives of a run: what a step is expected to send, and what one step of each stage sends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from far_scale.config.recipe import Recipe
from far_scale.distributed.collective_costs import ModelShapes, ParallelSetup, step_collectives
from far_scale.distributed.ledger import Ledger, table
from far_scale.distributed.process_group import Processes
from far_scale.model import FAR
from far_scale.train.deepspeed_adapter import communication_backend
from far_scale.train.sharding import Sharding
from far_scale.utils.event_log import EventLog

_STEADY = 3
"""The step, of those that are done in one go, from which on ZeRO-3 knows the order of the modules: steps are alike."""

# Keys of train.deepspeed that the formula does not cover, with the value that it assumes.
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
    """What a step of `recipe` sends on so many ranks, as lines of text; none for a process alone."""
    if ranks == 1:
        return []
    given = {} if recipe.train.deepspeed is None else recipe.train.deepspeed.explicit_values()
    for name, value in _ASSUMED.items():
        if given.get(name, value) != value:
            return [f"collectives: not worked out for train.deepspeed.{name}={given[name]}"]
    with torch.device("meta"):
        shapes = ModelShapes.from_model(FAR(recipe.far_config()))
    return table(step_collectives(shapes, setup_of(recipe, sharding, ranks, nodes)))


def setup_of(recipe: Recipe, sharding: Sharding, ranks: int, nodes: int) -> ParallelSetup:
    """What the formula needs to know of a run."""
    given = {} if recipe.train.deepspeed is None else recipe.train.deepspeed.explicit_values()
    number_bytes = {"bf16": 2, "fp32": 4}
    known = {  # a field of ParallelSetup, and DeepSpeed's key
        "reduce_bucket": "reduce_bucket_size",
        "sub_group": "sub_group_size",
        "prefetch_bucket": "stage3_prefetch_bucket_size",
        "reuse_distance": "stage3_max_reuse_distance",
        "live": "stage3_max_live_parameters",
    }
    values = {name: given[key] for name, key in known.items() if key in given}
    return ParallelSetup(
        ranks=ranks,
        nodes=nodes,
        stage=sharding.stage,
        number_bytes=number_bytes[recipe.train.precision],
        gradient_bytes=number_bytes[given.get("communication_data_type", recipe.train.precision)],
        packs=recipe.data.lanes // ranks,
        reduces_once=sharding.reduce_once,
        hpz=sharding.hpz,
        whole_below=recipe.train.whole_below,
        counts_clips=any(stage.data.tokens_per_pack is not None for stage in recipe.stages()),
        **values,
    )


class StepLedger:
    """Notes the collectives of one step of each stage on the main process, prints them and makes them an event.

    This is the third step: nothing is noted in a stage of fewer steps, nor where the process is alone. A validation
    right before it adds some gathers.

    Args:
        hosts: every rank's host, by rank.
        processes: who runs.
        events: of this process.
        say: prints a text.
    """

    def __init__(
        self, hosts: Sequence[str], processes: Processes, events: EventLog, say: Callable[[str], None]
    ) -> None:
        records = processes.is_main_process and processes.world_size > 1
        self._ledger = Ledger(hosts, communication_backend()) if records else None
        self._events, self._say, self._step = events, say, 0

    def begin_stage(self, done: int) -> None:
        """A stage begins, or is gone on with, after so many steps of the run."""
        self._step = done + _STEADY

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around all that a step sends, which is step number `step` (from 1)."""
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
            f"step {step}: {calls} collectives, of which a rank sends {within / 1e6:,.1f} MB in its node and "
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
        self._say("\n".join(table(entries)))
