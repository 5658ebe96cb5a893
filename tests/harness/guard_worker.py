"""Run under torchrun by test_guard.py: trains through bad steps, and writes down what they changed.

usage: guard_worker.py SHARDS OUT [NAME key=value ...] [, NAME key=value ...]
Each rank writes OUT/rank-N.json: one entry a run. A run whose name begins with "spikes" meets spikes, any other one
losses and a gradient that are not finite. On a GPU, any wait for it in optimizer step, guard or EMA raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from far_scale.config.recipe import load_recipe
from far_scale.data.loader.pack_loader import PackLoader
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import stop_processes
from far_scale.model.attention import choose_kernel, prepare
from far_scale.model.layers import HEAD_DIM
from far_scale.train import engine, loop
from far_scale.train.curriculum import stages
from far_scale.train.deepspeed_adapter import start_deepspeed_processes
from far_scale.train.device_prefetch import Batch
from far_scale.train.ema import ShardedEMA
from far_scale.train.flow_matching import add_noise, pack_loss
from far_scale.train.sharding import choose_sharding
from far_scale.train.step_guard import StepGuard
from far_scale.utils.event_log import EventLog
from harness.launch import small_recipe

GOOD = ""


class InfiniteGradient(torch.autograd.Function):
    """Changes nothing on the way forward."""

    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Injection:
    """Stands in for `pack_loss`: what this rank's second pack of the next step shall suffer."""

    def __init__(self) -> None:
        self.fault, self.pack = GOOD, 0

    def __call__(self, velocity: Tensor, noisy) -> Tensor:
        self.pack += 1
        fault = self.fault if self.pack == 2 else GOOD
        if fault == "gradient":
            velocity = InfiniteGradient.apply(velocity)
        loss = pack_loss(velocity, noisy)
        if fault == "infinite":
            return loss + float("inf")  # of a gradient that is finite
        return loss * {"nan": float("nan"), "spike": 1000.0}.get(fault, 1.0)


ASKING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class Waits(TorchDispatchMode):
    """Counts the operators by which a host asks a device for a number and waits."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += isinstance(func, torch._ops.OpOverload) and func._schema.name in ASKING
        return func(*args, **(kwargs or {}))


class Run:
    """One recipe's engine, EMA and guard, stepped by hand."""

    def __init__(self, name: str, overrides: list[str], shards: Path, out: Path, processes) -> None:
        spec, *others = small_recipe(shards, out / name, *overrides)
        self.recipe, self.processes, self.steps = load_recipe(spec, others), processes, 0
        (self.stage,) = stages(self.recipe)
        model = engine.build_model(self.recipe.far_config(), self.recipe.seed)
        recipe, sizes = self.recipe, [parameter.numel() for parameter in model.parameters()]
        self.sharding = choose_sharding(recipe.train, recipe.data.lanes, sizes, processes, lambda: 0)
        packs = recipe.data.lanes // processes.world_size
        self.engine = engine.start_engine(model, recipe.optimizer, recipe.train, packs, processes, self.sharding)
        self.ema = ShardedEMA(engine.fragments(self.engine), self.recipe.optimizer.ema_decay)
        self.guard = StepGuard(
            self.engine, self.recipe.faults, processes, EventLog(out / name, processes.is_main_process)
        )
        self.troubles: list[dict] = []
        self.waits: list[int] = []

    def step(self, batch: Batch, fault: str = GOOD, rank: int = 1) -> None:
        """Train on `batch`; `rank` suffers `fault`."""
        injection = Injection()
        injection.fault = fault if self.processes.rank == rank % self.processes.world_size else GOOD
        loop.pack_loss = injection
        engine.set_learning_rate(self.engine, 1e-3)
        self.steps += 1
        # The first steps load kernels and make buffers; what was wrong with a bad step is gathered on the host.
        strict = self.processes.device.type == "cuda" and self.steps > 2 and fault == GOOD and not self.guard.in_row
        step = self.engine.step
        with Waits() as waits:
            with mock.patch.object(self.engine, "step", lambda: step_without_waiting(step, strict)):
                once = self.sharding.reduce_once
                loop.train_step(self.engine, batch, self.stage, self.processes, guard=self.guard, reduce_once=once)
            with waiting_raises(strict):
                self.ema.update(self.guard.update_mask)
                trouble = self.guard.end_step(self.steps, batch.packs)
        self.note(trouble)
        self.waits.append(waits.count)

    def note(self, trouble) -> None:
        """Write down what the guard told."""
        if trouble is not None:
            self.troubles.append({key: str(value) for key, value in dataclasses.asdict(trouble).items()})

    def state(self) -> dict[str, Tensor]:
        """Copies of all that a step may change."""
        found = {}
        for fragment, average in zip(engine.fragments(self.engine), self.ema.weights, strict=True):
            tensors = (fragment.weight, fragment.exp_avg, fragment.exp_avg_sq, average)
            for kind, tensor in zip(("weight", "exp_avg", "exp_avg_sq", "ema"), tensors, strict=True):
                found[f"{kind}/{fragment.name}"] = tensor.detach().clone()
        for name, parameter in self.engine.module.named_parameters():
            found[f"model/{name}"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
        for number, state in enumerate(self.engine.basic_optimizer.state.values()):
            found[f"adam_step/{number}"] = state["step"].clone()
        return found


@contextlib.contextmanager
def waiting_raises(on: bool) -> Iterator[None]:
    """Any wait of the host for the GPU is an error."""
    if on:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on:
            torch.cuda.set_sync_debug_mode("default")


def step_without_waiting(step: Callable[[], None], strict: bool) -> None:
    with waiting_raises(strict):
        step()


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """What kinds of state differ in any bit."""
    assert before.keys() == after.keys()
    changed = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    return sorted(changed)


def not_finite(run: Run, batches: list[Batch], make_run) -> dict:
    """Steps 3, 5 and 6 are bad, on one rank each; then the same run without these batches."""
    faults = {3: ("nan", 1), 5: ("gradient", 0), 6: ("infinite", 1)}
    changed, norms = [], []
    for number, batch in enumerate(batches, 1):
        before = run.state()
        run.step(batch, *faults.get(number, ()))
        changed.append(differing(before, run.state()))
        norms.append(str(float(run.engine.get_global_grad_norm())))
    run.note(run.guard.settle())
    found, guard = run.state(), run.guard.state()
    run.engine.destroy()
    without = make_run()
    for number, batch in enumerate(batches, 1):
        if number not in faults:
            without.step(batch)
    undisturbed = differing(found, without.state())
    without.engine.destroy()
    adam_steps = [float(value) for name, value in found.items() if name.startswith("adam_step")]
    return {
        "changed": changed,
        "norms": norms,
        "unlike_a_run_without": undisturbed,
        "adam_steps": adam_steps,
        "guard": guard,
        "waits": run.waits,
    }


def spikes(run: Run, batches: list[Batch]) -> dict:
    """A spike after enough steps, the same after the guard's state was restored, and a row of bad steps."""
    for index in range(18):
        run.step(batches[index % len(batches)])
    run.note(run.guard.settle())
    kept = json.dumps(run.guard.state())
    before = run.state()
    run.step(batches[0], "spike")
    changed = differing(before, run.state())
    run.note(run.guard.settle())
    after_first = run.guard.state()

    run.guard.clear_levels()
    run.guard.load_state(json.loads(kept))
    again = run.guard.state() == json.loads(kept)
    run.step(batches[0], "spike")
    run.step(batches[1])

    rows = []
    for _ in range(3):
        run.step(batches[2], "nan")
        run.note(run.guard.settle())
        rows.append(run.guard.in_row)
    run.guard.reset_after_rollback()
    told = len(run.troubles)
    run.step(batches[3], "spike")  # of unknown levels
    run.note(run.guard.settle())
    run.engine.destroy()
    return {
        "changed": changed,
        "after_first": {key: after_first[key] for key in ("updates", "in_row", "skipped")},
        "state_again": again,
        "rows": rows,
        "in_row_at_end": run.guard.in_row,
        "told_after_forgetting": len(run.troubles) - told,
    }


def main() -> None:
    shards, out, *rest = sys.argv[1:]
    processes = start_deepspeed_processes()
    on_gpu = processes.device.type == "cuda"
    lengths = ["data.frames=[4,8]"] if on_gpu else []  # so that each step has another layout
    spec, *others = small_recipe(Path(shards), Path(out) / "unused", *lengths)
    recipe = load_recipe(spec, others)
    kernel = choose_kernel("auto", processes.device, torch.float32, HEAD_DIM).name
    shard_set = ShardSet.open(shards)
    scaling = LatentScaling.of(shard_set.manifest, recipe.data.scaling)
    (stage,) = stages(recipe)
    lanes = range(processes.rank, recipe.data.lanes, processes.world_size)
    batches = []
    with PackLoader(shard_set, scaling, lanes, stage.packing(recipe.seed)) as loader:
        for packs in (next(loader) for _ in range(7)):
            noisy = [add_noise(pack, recipe.objective, stage.config, recipe.seed) for pack in packs]
            for pack in noisy:
                prepare(pack.layout, processes.device, kernel)
            batches.append(Batch(packs, [pack.to(processes.device) for pack in noisy]))
    results = {"batches": [{pack.lane: list(pack.keys) for pack in batch.packs} for batch in batches]}
    for text in " ".join(rest).split(","):
        name, *overrides = text.split()

        def make_run(name: str = name, overrides: list[str] = overrides) -> Run:
            return Run(name, overrides, Path(shards), Path(out), processes)

        run = make_run()
        found = spikes(run, batches) if name.startswith("spikes") else not_finite(run, batches, make_run)
        results[name] = {**found, "troubles": run.troubles}
    (Path(out) / f"rank-{processes.rank}.json").write_text(json.dumps(results))
    stop_processes()


main()
