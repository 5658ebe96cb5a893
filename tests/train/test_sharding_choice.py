"""How a run is shared out: what is chosen for which nodes and memory, and why."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.distributed.process_group import Processes
from far_scale.train import sharding
from far_scale.train.sharding import Sharding, choose_sharding, state_bytes
from far_scale.utils.errors import UserError

SECTION = "train.deepspeed"


def choose(
    monkeypatch: pytest.MonkeyPatch,
    nodes: str,
    *overrides: str,
    parameters: float = 1e9,
    free: float | list[float] = 80e9,
    activations: float = 0.0,
    device: str = "cpu",
) -> Sharding:
    """The choice of ranks on `nodes`, a letter for each rank's."""
    each = free if isinstance(free, list) else [free] * len(nodes)
    monkeypatch.setattr(sharding, "all_gather_objects", lambda *_: list(zip(nodes, each, strict=True)))
    monkeypatch.setattr(sharding, "free_memory", lambda _: each[0])
    recipe = load_recipe("demo_cpu", overrides)
    processes = Processes(0, len(nodes), torch.device(device))
    return choose_sharding(recipe.train, recipe.data.lanes, [int(parameters)], processes, lambda: int(activations))


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Every rank's node, and what is asked for on it."""

    nodes: str
    billions: float
    asked: int | str = "auto"
    stage: int = 3


HPZ = {
    Cluster("a", 0.5, 8): (1, "ZeRO-3, no hpZ: one rank"),
    Cluster("aaaa", 0.5): (1, "ZeRO-3, no hpZ: one node"),
    Cluster("aabb", 0.5): (2, "ZeRO-3, hpZ 2: 2 nodes of 2 ranks, 0.5 billion parameters"),
    Cluster("aaaabbbbcccc", 1.37): (4, "ZeRO-3, hpZ 4: 3 nodes of 4 ranks, 1.4 billion parameters"),
    Cluster("aabb", 3.03): (1, "ZeRO-3, no hpZ: 2 nodes of 2 ranks, 3 billion parameters, more than 1.4"),
    Cluster("aabb", 3.03, 2): (2, "ZeRO-3, hpZ 2: as the recipe sets"),
    Cluster("abab", 0.5, 2): (
        2,
        "ZeRO-3, hpZ 2: as the recipe sets; its groups cross nodes, and so do backward's gathers",
    ),
    Cluster("aabb", 0.5, 1): (1, "ZeRO-3, hpZ 1: as the recipe sets"),
    Cluster("aaab", 0.5): (1, "ZeRO-3, no hpZ: the 2 nodes do not hold equally many consecutive ranks each"),
    Cluster("aabbc", 0.5): (1, "ZeRO-3, no hpZ: the 3 nodes do not hold equally many consecutive ranks each"),
    Cluster("abab", 0.5): (1, "ZeRO-3, no hpZ: the 2 nodes do not hold equally many consecutive ranks each"),
    Cluster("abcd", 0.5): (1, "ZeRO-3, no hpZ: 4 nodes of one rank"),
    Cluster("aabb", 0.5, stage=1): (1, "ZeRO-1"),
}


@pytest.mark.parametrize("cluster", HPZ, ids=str)
def test_hpz_follows_the_nodes_unless_the_recipe_sets_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [] if cluster.asked == "auto" else [f"{SECTION}.zero_hpz_partition_size={cluster.asked}"]
    keys = [f"train.zero_stage={cluster.stage}", *keys]
    found = choose(monkeypatch, cluster.nodes, *keys, parameters=cluster.billions * 1e9)
    assert (found.hpz, found.why[0]) == (HPZ[cluster][0], f"sharding: {HPZ[cluster][1]}")


def test_what_does_not_fit_the_ranks_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"zero_hpz_partition_size: 4 does not divide the 6 ranks; set it to a divisor"):
        choose(monkeypatch, "aaabbb", "train.zero_stage=3", f"{SECTION}.zero_hpz_partition_size=4")
    with pytest.raises(UserError, match=r"zero_quantized_weights: DeepSpeed quantises on GPUs only"):
        choose(monkeypatch, "aa", "train.zero_stage=3", f"{SECTION}.zero_quantized_weights=true")


AUTO = "train.zero_stage=auto"


@pytest.mark.parametrize(
    ("parameters", "stage", "words"),
    [
        # bf16 on 4 ranks, 2 packs each, bytes a parameter: ZeRO-1 2 + 4 + 2 + 16/4 = 12, and 2 in the update;
        # -2 2 + 16/4 + 4/4 = 7;
        # -3 22/4 = 5.5, and then 2 GB of gathered weights and 1 GB of activations.
        (1e9, 1, "ZeRO-1 (auto: the lowest that fits, a rank needs about 14 of 20 GB free)"),
        (2e9, 2, "ZeRO-2 (auto: the lowest that fits, a rank needs about 14 of 20 GB free, ZeRO-1 28)"),
        (
            2.6e9,
            3,
            "ZeRO-3 (auto: the lowest that fits, a rank needs about 17.3 of 20 GB free, ZeRO-1 36.4, ZeRO-2 18.2)",
        ),
        (4e9, 3, "ZeRO-3 (auto: none fits, a rank needs about 25 of 20 GB free)"),
    ],
)
def test_the_lowest_stage_that_fits_is_taken(
    parameters: float, stage: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [30e9, 20e9, 30e9, 30e9]  # the rank that has least decides
    keys = [AUTO, "train.precision=bf16"]
    found = choose(monkeypatch, "aaaa", *keys, parameters=parameters, free=free, activations=1e9)
    assert found.stage == stage
    assert found.why[0] == f"sharding: {words}" + (", no hpZ: one node" if stage == 3 else "")


def test_an_automatic_stage_takes_the_keys_of_any_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [AUTO, f"{SECTION}.zero_hpz_partition_size=2", f"{SECTION}.allgather_bucket_size=8"]
    assert choose(monkeypatch, "aabb", *keys, parameters=1e6).hpz == 1
    assert choose(monkeypatch, "aabb", *keys, parameters=1e9, free=6e9).hpz == 2


ONCE, EACH = "gradients: reduced once per step", "gradients: reduced after each of 2 packs"


@pytest.mark.parametrize(
    ("nodes", "keys", "expected"),
    [
        ("aaaa", ["train.zero_stage=3"], (False, (f"{EACH}: one node",))),
        ("aaaa", ["train.zero_stage=3", "train.reduce_once=true"], (True, (f"{ONCE}, as the recipe sets",))),
        ("aabb", ["train.zero_stage=3", "train.reduce_once=false"], (False, (f"{EACH}, as the recipe sets",))),
        ("aabb", ["train.zero_stage=1", "train.reduce_once=true"], (False, ())),
        ("aabb", ["train.zero_stage=3", "data.lanes=4"], (False, ())),
        # float32 of 1e9 parameters on 4 ranks: 24/4 bytes each, 4 gathered, 4/2 for hpZ, 4 for whole gradients; 1 GB
        # beside.
        (
            "aabb",
            ["train.zero_stage=3"],
            (
                True,
                (
                    f"{ONCE}, not after each of 2 packs: 2 nodes, and whole gradients fit: a rank needs about 17 of "
                    "19 GB free",
                ),
            ),
        ),
        # bf16: 22/4, 2 and 6: float32 sums beside the model's own gradients.
        (
            "aabb",
            ["train.zero_stage=3", "train.precision=bf16", f"{SECTION}.zero_hpz_partition_size=1"],
            (False, (f"{EACH}: whole gradients do not fit: a rank needs about 14.5 of 16 GB free",)),
        ),
    ],
)
def test_gradients_are_reduced_once_over_several_nodes_where_they_fit(
    nodes: str, keys: list[str], expected: tuple[bool, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 16e9 if "train.precision=bf16" in keys else 19e9
    found = choose(monkeypatch, nodes, "data.lanes=8", *keys, free=free, activations=1e9)
    assert (found.reduce_once, found.why[1:]) == expected


def test_memory_is_not_estimated_where_nothing_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the packs of long stages takes seconds."""
    recipe = load_recipe("demo_cpu", ["train.zero_stage=3"])
    monkeypatch.setattr(sharding, "all_gather_objects", lambda *_: [("a", 1e9)] * 4)
    ranks = Processes(0, 4, torch.device("cpu"))
    choose_sharding(recipe.train, recipe.data.lanes, [1000], ranks, lambda: pytest.fail("it is not needed"))


def test_an_old_deepspeed_reduces_each_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "can_reduce_once", lambda: False)
    found = choose(monkeypatch, "aabb", "train.zero_stage=3", "data.lanes=8")
    assert (found.reduce_once, found.why[1:]) == (False, (f"{EACH}: DeepSpeed 0.19.0 cannot sum them first",))
    with pytest.raises(UserError, match=r"train\.reduce_once: DeepSpeed 0\.19\.0 cannot; install a newer one"):
        choose(monkeypatch, "aabb", "train.zero_stage=3", "train.reduce_once=true")


def state_of(precision: str, sharding: Sharding, ranks: int = 4, packs: int = 1, **given: int) -> list[float]:
    """Bytes per parameter: resident, gradients in a forward pass, further ones when Adam steps."""
    state = state_bytes(precision, sharding, [8000], ranks, packs=packs, **given)
    return [value / 8000 for value in (state.resident, state.gradients, state.update)]


def test_state_takes_what_each_stage_leaves_whole() -> None:
    assert [state_of("bf16", Sharding(stage)) for stage in (0, 1, 2, 3)] == [
        [2 + 4 + 8 + 4, 0, 2 + 4],
        [2 + 4, 2, 2],
        [2 + 4, 0, 1],
        [0.5 + 4, 1, 0],
    ]
    # In float32 the masters of stage 0 are the weights; those of the other stages are copies.
    assert [state_of("fp32", Sharding(stage), ranks=1)[0] for stage in (0, 1, 2, 3)] == [16, 20, 20, 20]
    assert [state_of("bf16", Sharding(stage), packs=2)[1:] for stage in (0, 1, 2)] == [[2, 4], [4 + 2, 2], [1, 0]]
    assert state_of("bf16", Sharding(1), ranks=1)[1:] == [2, 4]
    assert state_of("bf16", Sharding(3, hpz=2, reduce_once=True))[:2] == [4.5 + 1, 1 + 6]
    assert state_of("bf16", Sharding(3, offloaded=frozenset({"optimizer", "param"})))[0] == 0


def test_state_counts_padding_and_unsharded_parameters() -> None:
    sizes = [10, 7, 100]
    assert state_bytes("bf16", Sharding(1), sizes, 4).ema == 4 * 120 // 4  # padded to a multiple of 8
    state = state_bytes("bf16", Sharding(3, gathered=1000), sizes, 4, whole_below=10)
    part, kept = 3 + 2 + 25, 12 + 8
    assert (state.weights, state.ema, state.gathered) == (2 * (part + kept), 4 * part, 2 * 100)
    assert state_bytes("bf16", Sharding(3, gathered=1000), sizes, 1).gathered == 0


@pytest.mark.parametrize(
    ("keys", "gigabytes"),
    [
        # 5e8 numbers a buffer, two of them in ZeRO-1 and -2, whose reduction runs beside backward.
        (["train.zero_stage=0", "train.precision=bf16"], 0),
        (["train.zero_stage=1", "train.precision=bf16"], 0),
        (["train.zero_stage=1"], 4),
        (["train.zero_stage=2", "train.precision=bf16"], 2),
        (["train.zero_stage=2", "train.precision=bf16", f"{SECTION}.overlap_comm=false"], 1),
        (["train.zero_stage=3", "train.precision=bf16"], 1),
        (["train.zero_stage=3", "train.precision=bf16", f"{SECTION}.communication_data_type=fp32"], 2),
        (["train.zero_stage=3", f"{SECTION}.reduce_bucket_size=2e9"], 8),
    ],
)
def test_the_buffers_of_gradients_take_a_gpus_memory(
    keys: list[str], gigabytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed makes them as large as reduce_bucket_size, also for a small model."""
    found = choose(monkeypatch, "aa", *keys, parameters=1e6, device="cuda")
    assert found.bucket_bytes == gigabytes * 1e9
    assert choose(monkeypatch, "aa", *keys, parameters=1e6).bucket_bytes == 0
    state = state_bytes("bf16", found, [1000], 2)
    assert state.buckets == gigabytes * 1e9 and state.gathered == (2000 if found.gathered else 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_bucket_beyond_the_memory_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = f"{SECTION}.reduce_bucket_size=5e11"
    with pytest.raises(UserError, match=r"reduce_bucket_size: 5e\+11 numbers take 2e\+03 GB on each rank, .* lower it"):
        choose(monkeypatch, "aa", "train.zero_stage=3", key, parameters=1e6, device=device)
    choose(monkeypatch, "aa", "train.zero_stage=1", "train.precision=bf16", key, parameters=1e6, device=device)


def test_an_automatic_stage_counts_these_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on 2 ranks, bytes a parameter: ZeRO-1 4 + 16/2 + 4 = 16, -2 4 + 16/2 + 4/2 = 14; buffers of 4 GB."""
    keys = [AUTO, "train.precision=fp32"]
    assert choose(monkeypatch, "aa", *keys, parameters=4e8, free=11e9).stage == 1
    on_gpus = choose(monkeypatch, "aa", *keys, parameters=4e8, free=11e9, device="cuda")
    words = "ZeRO-2 (auto: the lowest that fits, a rank needs about 9.6 of 11 GB free, ZeRO-1 10.4)"
    assert on_gpus.why[0] == f"sharding: {words}"


def test_offloaded_state_is_reported_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["train.zero_stage=3", f"{SECTION}.offload_optimizer.device=cpu", f"{SECTION}.offload_param.device=cpu"]
    found = choose(monkeypatch, "aa", *keys)
    assert found.offloaded == {"optimizer", "param"}
    assert found.why[0] == "sharding: ZeRO-3, no hpZ: one node, optimizer in main memory, param in main memory"


def test_shared_packs_keep_gradients_between_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks in groups of two have two of four lanes each: the second pack needs the first one's gradients, too."""
    # ZeRO-1 with 1e9 parameters on 4 ranks: 8 GB of state and 10 GB of activations; whole gradients are 4 GB more.
    keys = ["data.lanes=4", "train.zero_stage=auto"]
    assert choose(monkeypatch, "aabb", *keys, free=22e9, activations=10e9).stage == 1
    shared = choose(monkeypatch, "aabb", *keys, "train.sequence_parallel=2", free=22e9, activations=10e9)
    assert shared.stage == 2
