"""All that depends on DeepSpeed's internals, so that a new version is checked and adapted to in one place.

What replaces a part of DeepSpeed between backward and Adam's step is in deepspeed_update.py.

DeepSpeed's optimizer class depends on stage and precision. The float32 weights that Adam updates (masters) are:

    stage 0     float32: the model's own parameters; bf16: FP16_UnfusedOptimizer, a copy of each parameter
    stage 1     bf16: BF16_Optimizer, a run of all parameters laid end to end; float32: as stage 2
    stage 1, 2  DeepSpeedZeroOptimizer, likewise
    stage 3     DeepSpeedZeroOptimizer_Stage3, groups of this rank's pieces of each parameter

Every symbol used in either is in `SYMBOLS` or `_ATTRIBUTES`, with the versions that have it, and is checked at start.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from far_scale.distributed.ledger import phase
from far_scale.distributed.process_group import Processes, read_launcher_variables, start_processes
from far_scale.utils.errors import UserError

FIRST_TESTED, LAST_TESTED = (0, 19, 0), (0, 19, 8)
"""The range of versions that training was tested with."""


@dataclass(frozen=True)
class Symbol:
    """A DeepSpeed function or method that is called or replaced here.

    Attributes:
        path: `module:name`, the name with dots for a method.
        parameters: its first parameters, those that are relied on; others must have defaults.
        since: the first version that has it; an earlier one must not.
        replaced: whether it is replaced, so that DeepSpeed must call it with no more than `parameters`.
    """

    path: str
    parameters: tuple[str, ...]
    since: tuple[int, ...] = FIRST_TESTED
    replaced: bool = False

    def problem(self, installed: tuple[int, ...]) -> str | None:
        """How it differs from what is expected in the `installed` version; None if it does not."""
        module, _, name = self.path.partition(":")
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
        except (ImportError, AttributeError):
            return None if installed < self.since else f"{self.path} is missing"
        if installed < self.since:
            return f"{self.path} exists, which came with {_dotted(self.since)}"
        actual, relied = inspect.signature(_undecorated(function)).parameters, len(self.parameters)
        more = list(actual.values())[relied:]
        if tuple(actual)[:relied] != self.parameters or any(self.replaced or p.default is p.empty for p in more):
            return f"{self.path} takes ({', '.join(actual)}), expected ({', '.join(self.parameters)})"
        return None


STAGE_3 = "deepspeed.runtime.zero.stage3"
STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_REDUCES_ONCE = (0, 19, 1)
_NORM = ("self", "gradients", "params", "norm_type")

SYMBOLS = (
    Symbol("deepspeed:initialize", ("args", "model", "optimizer")),
    Symbol("deepspeed:init_distributed", ("dist_backend",)),
    Symbol("deepspeed.utils:set_z3_leaf_modules", ("model", "leaf_module_classes")),
    Symbol(f"{_ENGINE}.backward", ("self", "loss")),
    Symbol(f"{_ENGINE}.step", ("self",)),
    Symbol(f"{_ENGINE}.bfloat16_enabled", ("self",)),
    Symbol(f"{_ENGINE}.zero_optimization_stage", ("self",)),
    Symbol(f"{_ENGINE}.empty_partition_cache", ("self",)),
    Symbol(f"{_ENGINE}.coalesce_grad_reduction", ("self",), since=_REDUCES_ONCE),
    Symbol(f"{_ENGINE}._flush_coalesced_reduction_zero12", ("self", "optimizer"), since=_REDUCES_ONCE, replaced=True),
    Symbol(f"{_ENGINE}._flush_coalesced_reduction_zero3", ("self", "optimizer"), since=_REDUCES_ONCE, replaced=True),
    Symbol(f"{STAGE_3}:DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct", _NORM, replaced=True),
    Symbol(
        f"{STAGE_3}:DeepSpeedZeroOptimizer_Stage3.complete_grad_norm_calculation_for_cpu_offload",
        ("self", "params"),
        replaced=True,
    ),
    Symbol(
        f"{STAGE_3}:DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads",
        ("self", "sub_group_id", "total_norm"),
        replaced=True,
    ),
    Symbol(f"{STAGE_3}:DeepSpeedZeroOptimizer_Stage3.get_param_id", ("self", "param")),
    Symbol(f"{STAGE_3}:DeepSpeedZeroOptimizer_Stage3.invalidate_secondary_tensor", ("self",)),
    Symbol(f"{STAGE_3}:is_invalid_grad_norm", ("norm",), since=(0, 19, 8), replaced=True),
    Symbol(f"{STAGE_1_2}:DeepSpeedZeroOptimizer.get_grad_norm_direct", _NORM, replaced=True),
    Symbol(
        f"{STAGE_1_2}:DeepSpeedZeroOptimizer.unscale_and_clip_grads",
        ("self", "grad_groups_flat", "total_norm"),
        replaced=True,
    ),
    Symbol(f"{STAGE_1_2}:DeepSpeedZeroOptimizer.update_lp_params", ("self",)),
    Symbol(f"{STAGE_1_2}:is_invalid_grad_norm", ("norm",), since=(0, 19, 8), replaced=True),
    Symbol(f"{_BF16}.step", ("self", "closure"), replaced=True),
    Symbol(f"{_BF16}.update_lp_params", ("self",)),
    Symbol(f"{_BF16}.update_hp_grads", ("self", "clear_lp_grads"), replaced=True),
    Symbol(f"{_BF16}.get_grads_for_reduction", ("self",), replaced=True),
    Symbol(f"{_BF16}.clear_hp_grads", ("self",), replaced=True),
)

BF16_GRADIENTS = (
    "fp32_groups_gradients",
    "fp32_groups_gradient_dict",
    "fp32_groups_gradients_flat",
    "fp32_groups_actual_gradients_flat",
    "fp32_groups_gradient_flat_partition",
    "non_expert_gradients",
)
"""BF16_Optimizer's lists of its buffers of gradients, of the whole model in float32."""

# By the class that DeepSpeed wraps the optimizer in: attributes that it and the model's parameters must have.
_ATTRIBUTES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AdamW": ((), ()),
    "FP16_UnfusedOptimizer": (("step",), ()),
    "BF16_Optimizer": (("bf16_groups", "bf16_groups_flat", *BF16_GRADIENTS), ("_hp_mapping",)),
    "DeepSpeedZeroOptimizer": (("_global_grad_norm", "check_grad_overflow"), ("_hp_mapping",)),
    "DeepSpeedZeroOptimizer_Stage3": (
        ("_global_grad_norm", "fp32_partitioned_groups_flat", "grad_position", "flatten"),
        ("ds_tensor", "ds_numel", "ds_shape"),
    ),
}


@dataclass(frozen=True)
class Part:
    """This rank's part of one parameter, and its position in the float32 tensors that the optimizer updates.

    Attributes:
        name: the parameter's name in the model's state dict.
        size: number of elements of the whole parameter.
        offset: start of this part in the flattened parameter.
        master: the float32 tensor that holds it.
        start, length: position in the flattened master.
    """

    name: str
    size: int
    offset: int
    master: Tensor
    start: int
    length: int


def check_symbols() -> None:
    """Check that the installed DeepSpeed has all symbols that are used.

    Raises:
        UserError: names the first symbol that is not as expected, the version, and the versions that were tested.
    """
    installed = installed_version()
    if installed < FIRST_TESTED:
        raise _incompatible("it is older")
    for symbol in SYMBOLS:
        if (problem := symbol.problem(installed)) is not None:
            raise _incompatible(problem)


def installed_version() -> tuple[int, ...]:
    """The first three numbers of the installed DeepSpeed's version."""
    return tuple(int(number) for number in re.findall(r"\d+", version("deepspeed"))[:3])


def start_deepspeed_processes(timeout: datetime.timedelta | None = None) -> Processes:
    """Join the process group, which DeepSpeed then uses. Call once in a process, before DeepSpeed is loaded.

    Args:
        timeout: as for `start_processes`.

    Raises:
        UserError: as by `start_processes` and `check_symbols`.
    """
    read_launcher_variables()
    # DeepSpeed uses deprecated names; its users need not read so at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found none
    check_symbols()
    processes = start_processes(timeout)
    _use_process_group(dist.get_backend())
    return processes


def _use_process_group(backend: str) -> None:
    """Let DeepSpeed use the existing process group."""
    import deepspeed.ops

    if backend == "gloo":
        # DeepSpeed would compile a shared-memory all-reduce, which takes a minute and a compiler.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
        if not isinstance(compatible, dict) or "deepspeed_shm_comm" not in compatible:
            raise _incompatible('deepspeed.ops:__compatible_ops__["deepspeed_shm_comm"] is not there')
        compatible["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def communication_backend() -> Any:
    """DeepSpeed's communication backend; its methods start collectives."""
    from deepspeed.comm import comm

    backend = getattr(comm, "cdb", None)
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        if not hasattr(backend, name):
            raise _incompatible(f"deepspeed.comm.comm:cdb.{name} is missing")
    return backend


def make_engine(model: nn.Module, adam: torch.optim.AdamW, config: dict[str, Any], leaf: type[nn.Module]) -> Any:
    """DeepSpeed's engine around `model`.

    Args:
        config: DeepSpeed's.
        leaf: ZeRO-3 gathers the weights of a module of this type at once, with an eighth of the messages and hooks that
            gathering each layer in it takes.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.utils.set_z3_leaf_modules(model, [leaf])
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    _check_attributes(engine)
    return engine


def adam_optimizer(engine: Any) -> torch.optim.AdamW:
    """The optimizer given to `make_engine`, whatever DeepSpeed wrapped around it."""
    adam: torch.optim.AdamW = engine.basic_optimizer
    return adam


def master_weights(engine: Any) -> list[Tensor]:
    """The float32 tensors that the optimizer steps."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [master for group in adam_optimizer(engine).param_groups for master in group["params"]]


def parameter_parts(engine: Any) -> Iterator[Part]:
    """This rank's part of every parameter, in the model's order, without parameters that it holds nothing of."""
    stage, named = engine.zero_optimization_stage(), list(engine.module.named_parameters())
    if stage == 0:
        for (name, parameter), master in zip(named, master_weights(engine), strict=True):
            yield Part(name, parameter.numel(), 0, master, 0, parameter.numel())
    elif stage == 3:
        wrapper, groups = engine.optimizer, master_weights(engine)
        for name, parameter in named:
            group, start, part = wrapper.grad_position[wrapper.get_param_id(parameter)]
            offset = dist.get_rank() * part
            length = min(part, parameter.ds_numel - offset)  # the last ranks' parts end in padding
            if length > 0:
                yield Part(name, parameter.ds_numel, offset, groups[group], start, length)
    else:
        (master,) = master_weights(engine)  # one parameter group, so one flat tensor
        for name, parameter in named:
            mapping = parameter._hp_mapping
            if mapping is not None:
                start, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                yield Part(name, parameter.numel(), mapping.lp_fragment_address.start, master, start, length)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a whole parameter, before or after ZeRO-3 has sharded it."""
    return getattr(parameter, "ds_shape", parameter.shape)


@torch.no_grad()
def use_loaded_weights(engine: Any) -> None:
    """Copy the masters to the weights that the model computes with, after the masters were written to."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.empty_partition_cache()  # or gathered copies of the old weights would be used silently
        parameters = dict(engine.module.named_parameters())
        for part in parameter_parts(engine):
            weight = part.master.detach()[part.start : part.start + part.length]
            parameters[part.name].ds_tensor[: part.length].copy_(weight)
        engine.optimizer.invalidate_secondary_tensor()  # hpZ's copies, which emptying the cache may have made
    elif stage > 0:
        engine.optimizer.update_lp_params()
    elif engine.bfloat16_enabled():
        for parameter, master in zip(engine.module.parameters(), master_weights(engine), strict=True):
            parameter.copy_(master)


def can_reduce_once() -> bool:
    """Whether the installed DeepSpeed can sum the packs' gradients before it reduces them."""
    return installed_version() >= _REDUCES_ONCE


@contextlib.contextmanager
def optimizer_step(engine: Any, packs: int, reduce_once: bool) -> Iterator[Callable[[Tensor], None]]:
    """One optimizer step: yields the function that does backward, to be called with the loss of each of its `packs`.

    Args:
        reduce_once: sum the packs' gradients on each rank and reduce the sum, with DeepSpeed's gradient accumulation 1.
            Otherwise the gradients of each pack are reduced.
    """
    if not reduce_once:

        def backward_and_step(loss: Tensor) -> None:
            with phase("backward"):
                engine.backward(loss)
            with phase("update"):
                engine.step()

        yield backward_and_step
        return
    sums: dict[str, Tensor] = {}

    def backward(loss: Tensor) -> None:
        engine.backward(loss / packs)
        if engine.bfloat16_enabled():
            _add_to_sums(engine, sums)

    with phase("backward"), engine.coalesce_grad_reduction():
        try:
            yield backward
        except BaseException:
            # The run ends; a reduction on the way out would wait for the other ranks forever.
            engine._flush_coalesced_reduction_zero12 = engine._flush_coalesced_reduction_zero3 = lambda optimizer: None
            raise
        for name, parameter in engine.module.named_parameters() if sums else ():
            if name in sums:
                parameter.grad.copy_(sums.pop(name))
    with phase("update"):
        engine.step()


@torch.no_grad()
def _add_to_sums(engine: Any, sums: dict[str, Tensor]) -> None:
    """Move a pack's bf16 gradients to float32 sums over the packs: bf16 would lose small addends."""
    for name, parameter in engine.module.named_parameters():
        if parameter.grad is not None:
            if name in sums:
                sums[name].add_(parameter.grad)
            else:
                sums[name] = parameter.grad.float()
            parameter.grad.zero_()  # not None: a parameter sharded by ZeRO-3 takes no new gradient


def grad_norm(engine: Any) -> Tensor:
    """The global norm of this step's gradient before clipping, on the device: a scalar, the same on all ranks."""
    norm: Tensor = engine.optimizer._global_grad_norm
    return norm.detach().to(engine.device).reshape(())


def _check_attributes(engine: Any) -> None:
    """Check that a new engine has all attributes that are used; see `check_symbols`."""
    kind = type(engine.optimizer).__name__
    if kind not in _ATTRIBUTES:
        raise _incompatible(f"it steps ZeRO-{engine.zero_optimization_stage()} by a class {kind}")
    wrapper_names, parameter_names = _ATTRIBUTES[kind]
    parameter = next(engine.module.parameters())
    missing = [f"{kind}.{name}" for name in wrapper_names if not hasattr(engine.optimizer, name)]
    missing += [f"{name} of a parameter" for name in parameter_names if not hasattr(parameter, name)]
    engine_names = ("basic_optimizer", "module", "device", "communication_data_type", "gradient_average")
    missing += [f"DeepSpeedEngine.{name}" for name in engine_names if not hasattr(engine, name)]
    if missing:
        raise _incompatible(f"{missing[0]} is missing")


def _undecorated(function: Any) -> Any:
    """The function inside DeepSpeed's profiling decorator, which hides its parameters."""
    if getattr(function, "__qualname__", "") == "instrument_w_nvtx.<locals>.wrapped_fn":
        return inspect.getclosurevars(function).nonlocals["func"]
    return function


def _incompatible(problem: str) -> UserError:
    return UserError(
        f"DeepSpeed {version('deepspeed')} differs from what far_scale expects: {problem}; install a version from "
        f"{_dotted(FIRST_TESTED)} to {_dotted(LAST_TESTED)}, with which it was tested"
    )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
