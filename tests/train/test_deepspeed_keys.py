"""train.deepspeed: which of DeepSpeed's keys it takes, refuses and hands on, held against the installed DeepSpeed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from far_scale.config.deepspeed_keys import KEY_STAGES, SET_ELSEWHERE
from far_scale.config.recipe import load_recipe
from far_scale.config.schema import DeepSpeedSection
from far_scale.train.engine import deepspeed_config
from far_scale.train.sharding import Sharding
from far_scale.utils.errors import UserError

SECTION = "train.deepspeed"
VALUES = {
    "zero_hpz_partition_size": 2,
    "zero_quantized_weights": True,
    "zero_quantized_gradients": True,
    "communication_data_type": "fp32",
    "overlap_comm": True,
    "reduce_bucket_size": 1000,
    "reduce_scatter": True,
    "allgather_bucket_size": 1000,
    "allgather_partitions": False,
    "use_multi_rank_bucket_allreduce": False,
    "sub_group_size": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 1000,
    "stage3_model_persistence_threshold": 1000,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "offload_optimizer": {"device": "cpu", "pin_memory": False},
    "offload_param": {"device": "cpu", "pin_memory": True},
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
}
OF_RESULT = {"zero_quantized_weights", "zero_quantized_gradients", "communication_data_type"}


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("demo_cpu", overrides)
    return str(caught.value)


def test_every_key_of_the_installed_deepspeed_is_taken_or_refused_by_name() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    ours = set(DeepSpeedSection.model_fields)
    assert theirs <= ours | set(SET_ELSEWHERE)
    assert not ours & set(SET_ELSEWHERE)
    assert ours == set(KEY_STAGES) == set(VALUES), "each key has a value in this test, and stages where it counts"
    assert ours - theirs == {"communication_data_type"}, "which stands beside zero_optimization"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_reads_what_it_is_handed(stage: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    keys = {name: value for name, value in VALUES.items() if stage in KEY_STAGES[name]}
    overrides = [f"{SECTION}.{name}={value}" for name, value in keys.items()]
    recipe = load_recipe("demo_cpu", [f"train.zero_stage={stage}", *overrides])
    config = deepspeed_config(recipe.train, 2, False, Sharding(stage, 2))
    assert config["communication_data_type"] == "fp32"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    read = DeepSpeedZeroConfig(**config["zero_optimization"]).model_dump(by_alias=True)
    for name, value in keys.items():
        found = read.get(name)
        if isinstance(value, dict):
            assert {key: found[key] for key in value} == value
        else:
            assert name == "communication_data_type" or found == value


@pytest.mark.parametrize("name", SET_ELSEWHERE)
def test_a_key_that_is_set_elsewhere_is_refused_with_that_place(name: str) -> None:
    assert refusal(f"{SECTION}.{name}=1") == f"command line: {SECTION}.{name}: {SET_ELSEWHERE[name]}"


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    message = refusal(f"{SECTION}.reduce_buckets_size=5")
    assert message.startswith(f"command line: {SECTION}.reduce_buckets_size: unknown key; nearest valid key is ")
    assert f"{SECTION}.reduce_bucket_size" in message


REFUSED = {
    ("train.zero_stage=1", f"{SECTION}.zero_hpz_partition_size=2"): (
        "zero_hpz_partition_size: 2, but it has no effect with train.zero_stage 1; leave it out, or set "
        "train.zero_stage to 3"
    ),
    ("train.zero_stage=2", f"{SECTION}.stage3_max_live_parameters=9"): "stage3_max_live_parameters: 9, but it has no",
    ("train.zero_stage=3", f"{SECTION}.allgather_bucket_size=8"): "allgather_bucket_size: 8, but it has no effect",
    ("train.zero_stage=0", f"{SECTION}.overlap_comm=true"): "overlap_comm: True, but it has no effect",
    ("train.zero_stage=2", f"{SECTION}.offload_optimizer.device=cpu"): (
        "offload_optimizer: {'device': 'cpu', 'pin_memory': True}, but it has no effect"
    ),
    (f"{SECTION}.offload_optimizer.device=nvme",): "offload_optimizer.device: must be 'cpu', got 'nvme'",
    (f"{SECTION}.offload_param.nvme_path=x",): "offload_param.nvme_path: unknown key",
    (f"{SECTION}.zero_hpz_partition_size=0",): "zero_hpz_partition_size: must be auto or a number of ranks, at least 1",
    (f"{SECTION}.reduce_bucket_size=0",): "reduce_bucket_size: must be greater than or equal to 1, got 0",
    (f"{SECTION}.allgather_bucket_size=9",): "allgather_bucket_size: must be a multiple of 2, got 9",
    (f"{SECTION}.overlap_comm=1",): "overlap_comm: must be a valid boolean, got 1",
    ("train.zero_stage=3", f"{SECTION}.zero_quantized_gradients=true", f"{SECTION}.reduce_scatter=false"): (
        "reduce_scatter: false, but zero_quantized_gradients is a reduce-scatter"
    ),
}


@pytest.mark.parametrize("overrides", REFUSED, ids=lambda overrides: overrides[-1])
def test_what_does_not_fit_is_refused(overrides: tuple[str, ...]) -> None:
    assert refusal(*overrides).startswith(f"command line: {SECTION}.{REFUSED[overrides]}")


def test_sizes_may_be_written_as_deepspeed_writes_them() -> None:
    recipe = load_recipe("demo_cpu", [f"{SECTION}.reduce_bucket_size=5e8"])
    assert recipe.train.deepspeed is not None and recipe.train.deepspeed.reduce_bucket_size == 500_000_000


def test_only_what_changes_the_result_is_in_the_hash(tmp_path: Path) -> None:
    plain = load_recipe("demo_cpu", ["train.zero_stage=3"])
    for name, value in VALUES.items():
        stage = KEY_STAGES[name][-1]
        recipe = load_recipe("demo_cpu", [f"train.zero_stage={stage}", f"{SECTION}.{name}={value}"])
        assert (recipe.hash() == plain.hash()) == (name not in OF_RESULT), name
        recipe.save(tmp_path / f"{name}.yaml")
        assert load_recipe(tmp_path / f"{name}.yaml") == recipe
    assert (
        load_recipe("demo_cpu", ["train.zero_stage=3", f"{SECTION}.zero_quantized_weights=false"]).hash()
        == plain.hash()
    )
