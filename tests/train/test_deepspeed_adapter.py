"""A DeepSpeed that is not as the adapter knows it is refused in one line, before anything runs."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from far_scale.train import deepspeed_adapter
from far_scale.train.deepspeed_adapter import FIRST_TESTED, SYMBOLS, Symbol, check_symbols
from far_scale.utils.errors import UserError


def owner(symbol: Symbol) -> tuple[Any, str]:
    """Where a symbol lies, and its last name."""
    module, _, name = symbol.path.partition(":")
    found: Any = importlib.import_module(module)
    *around, last = name.split(".")
    for part in around:
        found = getattr(found, part)
    return found, last


def refusal() -> str:
    with pytest.raises(UserError) as caught:
        check_symbols()
    return str(caught.value)


def present() -> list[Symbol]:
    return [symbol for symbol in SYMBOLS if symbol.since <= deepspeed_adapter.installed_version()]


def test_the_installed_version_is_as_expected() -> None:
    check_symbols()


@pytest.mark.parametrize("symbol", present(), ids=lambda symbol: symbol.path)
def test_a_symbol_that_vanished_is_refused(symbol: Symbol, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name = owner(symbol)
    while name not in vars(where):  # of a class, it may come from one above
        where = next(base for base in where.__mro__ if name in vars(base))
    monkeypatch.delattr(where, name)
    version = ".".join(map(str, deepspeed_adapter.installed_version()))
    message = refusal()
    assert message.startswith(f"DeepSpeed {version} differs from what far_scale expects: {symbol.path} is missing; ")
    assert message.endswith("install a version from 0.19.0 to 0.19.8, with which it was tested")


@pytest.mark.parametrize("symbol", present(), ids=lambda symbol: symbol.path)
def test_a_symbol_with_other_parameters_is_refused(symbol: Symbol, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name = owner(symbol)
    monkeypatch.setattr(where, name, lambda self, unheard_of: None)
    assert f"{symbol.path} takes (self, unheard_of), expected ({', '.join(symbol.parameters)})" in refusal()


@pytest.mark.parametrize("symbol", [symbol for symbol in SYMBOLS if symbol.since > FIRST_TESTED], ids=str)
def test_what_came_with_a_version_is_expected_from_it_on(symbol: Symbol, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an earlier one it is unknown: nothing is prepared for it there."""
    before = (*symbol.since[:2], symbol.since[2] - 1)
    where, name = owner(symbol)
    monkeypatch.setattr(where, name, eval(f"lambda {', '.join(symbol.parameters)}: None"), raising=False)
    assert symbol.problem(symbol.since) is None
    assert symbol.problem(before) == f"{symbol.path} exists, which came with {'.'.join(map(str, symbol.since))}"
    monkeypatch.delattr(where, name)
    assert symbol.problem(symbol.since) == f"{symbol.path} is missing"
    assert symbol.problem(before) is None


def test_an_older_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_adapter, "installed_version", lambda: (0, 18, 9))
    assert "it is older; install a version from 0.19.0" in refusal()


@pytest.mark.parametrize("missing", ["fp32_partitioned_groups_flat", "ds_numel", "basic_optimizer"])
def test_an_attribute_that_vanished_is_refused(missing: str) -> None:
    model = torch.nn.Linear(1, 1)
    for name in {"ds_tensor", "ds_numel", "ds_shape"} - {missing}:
        setattr(model.weight, name, 1)
    names = {"_global_grad_norm", "fp32_partitioned_groups_flat", "grad_position", "flatten"} - {missing}
    wrapper = type("DeepSpeedZeroOptimizer_Stage3", (), dict.fromkeys(names, 1))()
    own = {"basic_optimizer": None, "module": model, "device": None, "optimizer": wrapper}
    engine = types.SimpleNamespace(**{name: value for name, value in own.items() if name != missing})
    with pytest.raises(UserError, match=rf"far_scale expects: .*{missing}.* is missing; install"):
        deepspeed_adapter._check_attributes(engine)


def test_an_optimizer_of_another_class_is_refused() -> None:
    engine = types.SimpleNamespace(optimizer=object(), zero_optimization_stage=lambda: 2)
    with pytest.raises(UserError, match=r"it steps ZeRO-2 by a class object; install"):
        deepspeed_adapter._check_attributes(engine)


def test_bf16_gradients_are_summed_in_float32() -> None:
    """256 packs of 1 and one of 1/2: bf16 stops at 256, and would lose the half."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    engine, sums = types.SimpleNamespace(module=model), dict[str, torch.Tensor]()
    for gradient in [1.0] * 256 + [0.5]:
        (model.weight.sum() * gradient).backward()
        deepspeed_adapter._add_to_sums(engine, sums)
    assert sums["weight"].item() == 256.5 and model.weight.grad is not None and model.weight.grad.item() == 0


def test_a_step_that_fails_reduces_nothing_on_its_way_out() -> None:
    """The other ranks may not come to that reduction."""
    done = []

    class Engine:
        @contextlib.contextmanager
        def coalesce_grad_reduction(self) -> Iterator[None]:
            try:
                yield
            finally:
                self._flush_coalesced_reduction_zero12(None)
                self._flush_coalesced_reduction_zero3(None)

        def _flush_coalesced_reduction_zero12(self, optimizer: object) -> None:
            done.append("stage 1 or 2")

        def _flush_coalesced_reduction_zero3(self, optimizer: object) -> None:
            done.append("stage 3")

        def step(self) -> None:
            done.append("step")

    with (
        pytest.raises(RuntimeError, match="out of memory"),
        deepspeed_adapter.optimizer_step(Engine(), packs=2, reduce_once=True),
    ):
        raise RuntimeError("out of memory")
    assert done == []
