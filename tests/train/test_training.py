"""Training end to end on recorded video, with real processes: ZeRO stages, resume, export, samples."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from far_scale.train.checkpoint.export import export
from harness.launch import ROOT, small_recipe
from harness.plain_training import Plain, train_plainly
from harness.processes import launch, run, start_ranks

pytestmark = pytest.mark.slow


def keys(stage: int, *of_deepspeed: str) -> str:
    """The overrides of a ZeRO stage with keys of train.deepspeed."""
    return " ".join([f"train.zero_stage={stage}", *(f"train.deepspeed.{key}" for key in of_deepspeed)])


RUNS = {
    "zero3": "train.zero_stage=3",
    "zero2": "train.zero_stage=2",
    "zero1": "train.zero_stage=1",
    "zero0": "train.zero_stage=0",
    **{
        # As on GPUs, but for their streams: gradients are reduced during backward, in several buckets.
        f"overlap_zero{stage}": keys(stage, "overlap_comm=true", "reduce_bucket_size=30_000")
        for stage in (1, 2, 3)
    },
    "keys_zero2": keys(
        2,
        "allgather_partitions=false",
        "use_multi_rank_bucket_allreduce=false",
        "allgather_bucket_size=1000",
        "reduce_scatter=false",
    ),
    "keys_zero3": keys(
        3,
        "stage3_prefetch_bucket_size=0",
        "stage3_max_live_parameters=1000",
        "stage3_max_reuse_distance=0",
        "stage3_allgather_sequential=true",
        "reduce_scatter=false",
        "enable_sanity_checks=true",
    ),
    "offloaded": keys(3, "offload_optimizer.device=cpu", "offload_param.device=cpu", "sub_group_size=20_000"),
    "bf16_offloaded": f"{keys(3, 'offload_optimizer.device=cpu')} train.precision=bf16",
    "checkpointing": "train.zero_stage=3 train.activation_checkpointing=full",
    "bf16_zero3": "train.zero_stage=3 train.precision=bf16",
    "bf16_zero1": "train.zero_stage=1 train.precision=bf16",
    "bf16_zero0": "train.zero_stage=0 train.precision=bf16",
}
if shutil.which("g++"):
    RUNS["compiled"] = "train.zero_stage=3 train.compile=true train.activation_checkpointing=attention-kept"


@pytest.fixture(scope="module")
def runs(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every recipe of RUNS, 10 steps on 2 ranks, in one start of the processes; the compiled one is also validated."""
    out = tmp_path_factory.mktemp("runs")
    more = {"compiled": f"validation.every=5 validation.clips=4 validation.shards={recorded_shards}"}
    arguments = ",".join(f"{name} {overrides} {more.get(name, '')}" for name, overrides in RUNS.items())
    worker = ROOT / "tests/harness/training_worker.py"
    finished = launch(2, worker, recorded_shards, out, arguments, timeout=600)  # minutes on a machine that is busy
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def plain(recorded_shards: Path) -> Plain:
    """The same 10 steps in plain PyTorch on one process: losses, and the EMA."""
    return train_plainly(recorded_shards)


def logged(run: Path, key: str = "loss") -> list[float]:
    lines = [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "validation" not in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "every step stands there once"
    return [line[key] for line in lines]


def exported(run: Path, out: Path, weights: str) -> dict[str, torch.Tensor]:
    export(run, None, weights, out)  # type: ignore[arg-type]
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("bf16")])
def test_every_stage_trains_as_plain_pytorch(runs: Path, plain, name: str, tmp_path: Path) -> None:
    losses, ema = plain.losses, plain.ema
    ours = logged(runs / name)
    assert len(ours) == 10 and losses[-1] < losses[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-5, atol=0)
    theirs = exported(runs / name, tmp_path / "model", "ema")
    assert theirs.keys() == ema.keys()
    for key, value in ema.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif("compiled" not in RUNS, reason="there is no C++ compiler")
def test_layers_compile_once_under_zero3(runs: Path) -> None:
    """The log counts the graphs: all there will be after the first step, and then no more, whatever is validated."""
    graphs = logged(runs / "compiled", "compiled_graphs")
    assert (runs / "compiled" / "log.jsonl").read_text().count('"validation"') == 2
    assert graphs[0] >= 1 and set(graphs) == {graphs[0]}


def test_bfloat16_follows_float32_at_every_stage(runs: Path, plain) -> None:
    for name in ("bf16_zero3", "bf16_zero1", "bf16_zero0", "bf16_offloaded"):
        torch.testing.assert_close(torch.tensor(logged(runs / name)), torch.tensor(plain[0]), rtol=5e-3, atol=0)


def test_the_log_tells_what_was_promised(runs: Path) -> None:
    line = json.loads((runs / "zero3" / "log.jsonl").read_text().splitlines()[-1])
    promised = {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "clips_per_second",
        "tokens_per_second",
        "mfu",
        "data_wait",
    }
    assert promised <= line.keys() and "memory_gb" in line
    assert 0 < line["mfu"] < 1 and 0 <= line["data_wait"] < 1 and line["grad_norm"] > 0
    norms = [torch.tensor(logged(runs / name, "grad_norm")) for name in ("zero3", "zero1", "zero0")]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(norms[0], norms[2], rtol=1e-4, atol=0)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs: Path, recorded_shards: Path, tmp_path: Path) -> None:
    """kill -9 of all processes after the checkpoint of step 5, then the same command again."""
    run = tmp_path / "killed"
    training = ["-m", "far_scale.train", *small_recipe(recorded_shards, run, "train.zero_stage=3")]
    started = start_ranks(2, *training)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").exists():
        assert started[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    started.kill()
    started.wait()
    assert (run / "checkpoints" / "latest").read_text() == "step-00000005\n"

    finished = launch(2, *training)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert logged(run) == logged(runs / "zero3")
    for weights in ("model", "ema"):
        whole = exported(runs / "zero3", tmp_path / f"whole_{weights}", weights)
        resumed = exported(run, tmp_path / f"resumed_{weights}", weights)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_another_rank_count_and_stage_go_on_from_the_same_checkpoint(
    runs: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "elastic"
    shutil.copytree(runs / "zero3", run)
    (run / "checkpoints" / "latest").write_text("step-00000005\n")
    finished = launch(1, "-m", "far_scale.train", *small_recipe(recorded_shards, run, "train.zero_stage=auto"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "sharding: ZeRO-1 (auto: the lowest that fits, a rank needs about " in finished.stdout + finished.stderr
    torch.testing.assert_close(torch.tensor(logged(run)), torch.tensor(logged(runs / "zero3")), rtol=1e-5, atol=0)


def test_a_sample_from_the_exported_directory_equals_the_training_process(
    runs: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; from far_scale.evaluation.rollouts.runner import evaluate_rollout, load_for_sampling; "
        "from far_scale.sampling.config import SamplingConfig; "
        "model, shards, out = sys.argv[1:]; "
        "evaluate_rollout(*load_for_sampling(model), shards, SamplingConfig(4, 3, seed=5), 4, 3, out)"
    )
    finished = run("-c", script, runs / "model", recorded_shards, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    in_training = load_file(runs / "sampled_in_training" / "samples.safetensors")["latents"]
    assert in_training.std() > 0.1
    assert torch.equal(load_file(tmp_path / "samples.safetensors")["latents"], in_training)


@pytest.mark.gpu
def test_one_gpu_trains_as_the_cpu(plain, recorded_shards: Path, tmp_path: Path) -> None:
    """ZeRO-3 in bfloat16 on one GPU, with the varlen flash kernel, follows the float32 losses of the CPU."""
    run = tmp_path / "run"
    finished = launch(1, "-m", "far_scale.train", *small_recipe(recorded_shards, run, "train.precision=bf16"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    torch.testing.assert_close(torch.tensor(logged(run)), torch.tensor(plain[0]), rtol=5e-3, atol=0)
