"""The benchmarks run and write their results, and their reference is right. No timing is checked."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from far_scale.convert.model_dir import save_model_dir
from far_scale.model.attention import dense
from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece
from harness import processes
from harness.play import metadata_of, random_state, small_config

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"

Tables = dict[str, list[dict[str, Any]]]


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [BENCHMARKS / f"{name}.py", "--device", "cpu", "--threads", 1, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("FAR_SCALE_ATTENTION", None)
    return processes.run(*command, env=environment)


def tables_of(folder: Path, finished: subprocess.CompletedProcess[str]) -> Tables:
    """What the benchmark wrote, read from the one JSON file in `folder`; the Markdown beside it was printed, too."""
    assert finished.returncode == 0, finished.stderr
    (path,) = folder.glob("*.json")
    written = json.loads(path.read_text())
    assert written["facts"]["torch"] == torch.__version__ and written["facts"]["command"]
    markdown = path.with_suffix(".md").read_text()
    for title in written["tables"]:
        assert f"## {title}" in markdown and title in finished.stdout
    return written["tables"]


def positive(row: dict[str, Any], *columns: str) -> bool:
    return all(math.isfinite(row[column]) and row[column] > 0 for column in columns)


def test_attention_is_timed_against_its_rivals(tmp_path: Path) -> None:
    shape = ("--frames", 3, "--tokens", 16, "--long", 18, "--clips", 2, "--heads", 1)
    finished = run("attention", *shape, "--rivals", "dense", "loop", "plain", "--repeats", 2, "--out", tmp_path)
    sides, ratios = tables_of(tmp_path, finished).values()
    names = ["ours, cpu", "plain causal, cpu", "dense mask", "prefix loop"]
    assert [row["side"] for row in sides] == names * 4  # two cases in two dtypes
    for row in sides:
        assert positive(row, "ms", "ms forward", "TFLOP/s") and len(row["seconds"]["both"]) == row["repeats"] == 2
        assert row["right"] is (None if row["side"].startswith("plain") else True)
    # 3 frames of 16 tokens; 2 context frames of 1 token, then 16 frames of 16.
    assert {row["pairs"] // 2 for row in sides[::4]} == {16**2 * 6, 1 + 2 + 16**2 * 136 + 2 * 256}
    for at, row in enumerate(ratios):
        own, limit, mask, loop = sides[4 * at : 4 * at + 4]
        assert row["dense mask"] == mask["ms"] / own["ms"] and row["prefix loop"] == loop["ms"] / own["ms"]
        assert row["plain causal"] == limit["ms"] / own["ms"] * (own["pairs"] / limit["pairs"])
        assert 0.95 < limit["pairs"] / own["pairs"] <= 1 and row["FlexAttention"] is None


def test_saves_are_timed_with_each_kind_of_checksum(tmp_path: Path) -> None:
    finished = run("checkpoint_save", "--megabytes", 2, "--tensors", 2, "--repeats", 1, "--out", tmp_path)
    (rows,) = tables_of(tmp_path, finished).values()
    assert [row["checksums"] for row in rows] == [
        "while writing",
        "read again",
        "read again from the disk",
        "no checksums",
    ]
    assert all(positive(row, "seconds", "quickest", "CPU seconds", "MB/s") for row in rows)


def test_each_pass_of_the_update_is_timed(tmp_path: Path) -> None:
    finished = run("optimizer_pass", "--model", "B", "--layers", 1, "--repeats", 1, "--out", tmp_path)
    (rows,) = tables_of(tmp_path, finished).values()
    totals = {row["side"]: row["bytes a parameter"] for row in rows if row["pass"] == "all"}
    assert totals == {"ZeRO-1, DeepSpeed's": 96, "ZeRO-1, ours": 68, "ZeRO-3, DeepSpeed's": 66, "ZeRO-3, ours": 58}
    assert all(positive(row, "ms") for row in rows)


def test_a_kernel_that_is_not_usable_is_refused(tmp_path: Path) -> None:
    finished = run("attention", "--kernels", "flash-attn-2", "--out", tmp_path)
    assert finished.returncode == 2 and "--kernels flash-attn-2: runs only on NVIDIA GPUs" in finished.stderr


def test_a_rival_that_fails_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention
    from attention_sides import causal_frames

    def fail(*_: object) -> None:
        raise ValueError("no such thing\nand more of it")

    monkeypatch.setattr(attention, "prefix_loop", fail)
    case, cpu = causal_frames(clips=1, frames=2, tokens=4, heads=1), torch.device("cpu")
    own, loop = rows = attention.measure_case(case, "fp32", ["cpu"], ["loop"], cpu, repeats=1, minutes=1)
    assert own["note"] == "" and own["right"] is True and positive(own, "ms")
    assert loop["note"] == "ValueError: no such thing" and loop["ms"] is None and own.keys() == loop.keys()
    assert attention.ratio_row(rows, "cpu")["prefix loop"] is None


def test_train_steps_are_timed_in_each_mode(tmp_path: Path) -> None:
    shapes = ("--shapes", "B:2", "B-Long:17", "--layers", 1, "--clips", 2)
    finished = run("train_step", *shapes, "--modes", "eager", "eager,full", "--repeats", 1, "--out", tmp_path)
    (rows,) = tables_of(tmp_path, finished).values()
    assert [row["side"] for row in rows] == ["eager", "eager, full"] * 2
    assert [row["model"] for row in rows[::2]] == ["FAR-B, 1 layers", "FAR-B-Long, 1 layers"]
    for first, row in ((rows[at - at % 2], rows[at]) for at in range(4)):
        assert positive(row, "step", "gradients", "update", "tokens/s", "TFLOP/s", "MFU")
        assert row["eager / this"] == pytest.approx(first["step"] / row["step"]) and row["clips"] == 2
        assert row["tokens/s"] == pytest.approx((2 * 2 * 64 if row["frames"] == 2 else 2 * (4 + 16 * 64)) / row["step"])


def test_whole_train_steps_on_varying_layouts(tmp_path: Path) -> None:
    shape = ("--shapes", "B:6", "--layers", 1, "--clips", 2, "--modes", "eager", "--repeats", 1)
    finished = run("train_step", *shape, "--whole", "--layouts", "varying", "--out", tmp_path)
    (rows,) = tables_of(tmp_path, finished).values()
    bare, whole = rows
    assert [row["side"] for row in rows] == ["eager", "eager, whole"]
    assert (bare["this / bare"], whole["this / bare"]) == (1, whole["step"] / bare["step"])
    draw = random.Random(0)
    for row in rows:
        assert row["step"] == pytest.approx(row["gradients"] + row["update"]) and row["note"] == ""
    # The timed step comes after four others; where no peak is known, after three. Both sides have the same layouts.
    lengths = [[draw.randint(3, 6) for _ in range(2)] for _ in range(4 if bare["peak MB"] is None else 5)][-1]
    assert all(row["tokens/s"] * row["step"] == pytest.approx(64 * sum(lengths)) for row in rows)


def test_train_step_names_the_fix() -> None:
    finished = run("train_step", "--shapes", "B-Long:16")
    assert finished.returncode == 2
    assert "--shapes B-Long:16: not a preset and at least 17 frames" in finished.stderr


def test_reading_is_timed_against_tar_and_webdataset(tmp_path: Path) -> None:
    finished = run("data", "--samples", 5, "--per-shard", 2, "--repeats", 2, "--lanes", 2, "--out", tmp_path)
    sides, states = tables_of(tmp_path, finished).values()
    ours = [f"ours, {files} {way}" for files in ("tar", "MDS") for way in ("by offset", "streamed")]
    assert [row["side"] for row in sides] == ["plain tar", "WebDataset's loop", *ours]
    for row in sides:
        assert positive(row, "MB/s", "samples/s", "of plain tar", "of WebDataset's loop") and len(row["seconds"]) == 2
    assert sides[0]["of plain tar"] == sides[1]["of WebDataset's loop"] == 1
    assert all(row["next 100 packs the same"] and positive(row, "restore and first pack, s") for row in states)
    assert {row["set"] for row in states} == {"tars", "MDS", "mixture of both"}


def test_lanes_at_scale_walks_whole_nodes(tmp_path: Path) -> None:
    shape = ("--shards", 60, "--samples", 10, "--ranks", 8, "--node", 2, "--nodes", 2, "--lanes", 16, "--steps", 3)
    finished = run("lanes_at_scale", *shape, "--repeats", 1, "--out", tmp_path)
    parts, memory, walks = tables_of(tmp_path, finished).values()
    assert all(positive(row, "seconds") for row in parts) and positive(parts[0], "bytes") and len(memory) == 2
    clips, budget = walks
    assert clips["ranks walked"] == budget["ranks walked"] == 4
    for row in walks:
        assert positive(row, "read beyond what a node needs, %", "shards in a step, most", "indexes read, most")
    assert clips["tokens of a step, most / mean"] > 1.1 > budget["tokens of a step, most / mean"] >= 1


def test_collectives_are_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import collectives

    rows = collectives.worked_out("B", nodes=2, node=2)
    assert [(row["shared out by"], row["packs"]) for row in rows[:3]] == [
        (name, 1) for name in ("ZeRO-1", "ZeRO-3", "ZeRO-3, hpZ 2")
    ]
    for row in rows:
        parts = ("of it weights, forward", "weights, backward", "weights, after the update", "gradients")
        assert row["to other nodes"] == pytest.approx(sum(row[part] for part in parts))
        assert row["GB out of a node"] == pytest.approx(2 * row["to other nodes"] / 1e3)


def test_sequence_parallelism_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange: 12 numbers of the width a token and layer at 2 GPUs, half of them sent."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sequence_parallel

    rows = sequence_parallel.worked_out(gigabytes=100.0, mfu=0.5)
    assert [(row["frames"], row["GPUs a pack"]) for row in rows[:4]] == [(16, 2), (16, 4), (16, 8), (64, 2)]
    first = rows[0]
    log_sum_exps = 4 * 18 * 2 / (2 * 1152)  # of forward and backward, 4 bytes a head, in numbers of the width
    assert first["MB sent by a GPU"] * 1e6 == pytest.approx(28 * 512 * 1152 * 2 * (12 + log_sum_exps) / 2)
    assert first["ms exchange"] == pytest.approx(first["MB sent by a GPU"] / 100)
    assert first["ms arithmetic"] == pytest.approx(first["even"])  # 16 frames and 18 heads divide by 2
    assert all(row["ms arithmetic"] > row["even"] for row in rows if row["GPUs a pack"] == 4)  # not by 4


def test_convergence_counts_flops_and_averages_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made-up scores: LPIPS of the three clips is seed / 10 more than 0.1, 0.2 and 0.3."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import convergence
    from convergence_scores import Held, Scoring

    monkeypatch.setattr(sys, "argv", ["convergence.py", "--work", str(tmp_path), "--steps", "200", "--scored", "2"])
    runs = list(convergence.planned(convergence.arguments()))
    assert [run.folder.name for run in runs[:4]] == [
        f"{name}-seed-{n}" for n in (0, 1) for name in ("far", "video-dit")
    ]
    assert len(runs) == 3 * 3 + 5 * 2 and runs[-1].recipe.far_config().context_patch

    trained: list[str] = []

    def scores(run: convergence.Run, held: Held, scored: int) -> dict[str, dict[str, dict[str, object]]]:
        values = {"lpips": [0.1 * (n + run.seed) for n in (1, 2, 3)], "mse": [0.01] * 3, "ssim": [0.5] * 3}
        return {name: {"100": values, "200": values} for name in run.variant.scorings}

    def train(run: convergence.Run) -> None:
        run.folder.mkdir()
        trained.append(run.folder.name)

    monkeypatch.setattr(convergence, "train", train)
    monkeypatch.setattr(convergence, "scores", scores)
    monkeypatch.setattr(convergence, "logged", lambda run: {"seconds a step": 1.0, "memory GB": 2.0})
    held = Held(tmp_path, 3, 2, lambda a, b: (a - b).abs().mean((1, 2, 3)))
    rows = [row for _ in range(2) for run in runs[:6] for row in convergence.run_rows(run, held, 2)][12:]
    assert len(trained) == 6  # not again
    far, dit = convergence.final_rows(rows)
    assert (far["side"], far["seeds"], far["steps"], far["std over seeds"]) == ("FAR", 3, 200, "0.100")
    assert far["LPIPS"] == pytest.approx(0.3) and far["PSNR"] == pytest.approx(20)
    assert far["95% over clips"] == "0.200 to 0.400" and far["less the first's"] == "-"
    assert (dit["less the first's"], dit["its 95% over clips"]) == ("+0.000", "0.000 to 0.000")
    # Two lanes of two clips of 16 frames, 16 tokens each: of every pair of frames, FAR attends one, not both.
    pairs = 2 * 2 * 16**2 * (16 * 15 // 2)
    assert dit["train TFLOP"] - far["train TFLOP"] == pytest.approx(200 * 3 * 2 * 4 * 2 * 192 * pairs / 1e12)
    convergence.draw(tmp_path / "curves.png", rows, [{"LPIPS": 0.4, "PSNR": 15.0}] * 2)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    for number in range(2):
        frames = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
        frames[2:] = 51 * (number + 1)
        np.savez(tmp_path / f"{number}.npz", frames=frames.numpy(), fps=10)
    repeated = held.repeated(Scoring(given=2, frames=2))
    assert repeated.lpips == pytest.approx([0.2, 0.4]) and repeated.mse == pytest.approx([0.04, 0.16])


def test_encoding_is_timed_on_both_kinds_of_video(tmp_path: Path) -> None:
    ((_, rows),) = tables_of(
        tmp_path, run("encoding", "--videos", 2, "--frames", 8, "--workers", 1, "--repeats", 1, "--out", tmp_path)
    ).items()
    assert [row["side"] for row in rows] == ["mp4", "npz", "the autoencoder alone"]
    for row in rows:
        wall, busy, process, computed = (row["seconds"][name][0] for name in ("wall", "busy", "process", "computed"))
        assert 0 < busy < wall and 0 < computed < process


def test_damaged_videos_are_never_read_as_shorter_ones(tmp_path: Path) -> None:
    finished = run("fuzz_videos", "--mutations", 69, "--seed", 3, "--workers", 1, "--out", tmp_path)
    by_kind, by_damage = tables_of(tmp_path, finished).values()  # exit status 1: one was, or a decoder crashed or hung
    assert by_kind[-1]["damaged"] == by_damage[-1]["damaged"] == 69 and len(by_kind) == 24 and len(by_damage) == 7
    assert by_kind[-1]["refused"] > 30
    assert all(row["outcome"] in ("wrong pixels", "more frames") for row in by_damage[-1]["files"])
    cut_off = by_damage[0]
    assert cut_off["damage"] == "cut off" and cut_off["refused"] == cut_off["damaged"] > 20


def test_the_reference_of_the_attention_benchmark_is_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from attention_sides import causal_frames, exact

    case = causal_frames(clips=2, frames=3, tokens=5, heads=2)
    inputs = case.draw(torch.device("cpu"), torch.float64)
    q, k, v, dout = (x.flatten(0, 1) for x in inputs)
    order = case.layout.window_plan
    out, lse = dense.forward(q, k, v, order)
    dq, dk, dv = dense.backward(dout, q, k, v, out, lse, order)
    for ours, reference in zip(exact(case, inputs), (out, dq, dk, dv), strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), reference, rtol=0, atol=1e-12)


def finished_run(run: Path) -> Path:
    """Two steps' log and the last checkpoint, of one small tensor of each kind."""
    names = [f"{kind}/layer" for kind in ("weight", "exp_avg", "exp_avg_sq", "ema")]
    pieces = {name: FlatPiece(3, 0, torch.tensor([0.1, -0.2, 0.3])) for name in names}
    checkpoint.save(run, 2, pieces, {"lanes": {"0": {"epoch": 0, "place": 4}}}, keep=1)
    (run / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in (1, 2)))
    return run


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq", "ema"])
def test_the_fault_drill_sees_a_single_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sameness import KINDS, compare

    one, other = finished_run(tmp_path / "one"), finished_run(tmp_path / "other")
    assert all(row["equal"] and not row["largest difference"] for row in compare(one, other, 2))
    tensor = torch.tensor([0.1, -0.2, 0.3])
    tensor.view(torch.int32)[1] ^= 1
    folder = checkpoint.step_folder(other, 2)
    kept = {name: FlatPiece(3, 0, torch.empty(3)) for name in (f"{k}/layer" for k in KINDS)}
    checkpoint.load(folder, kept, single_process=True)
    checkpoint.save(other, 2, {**kept, f"{kind}/layer": FlatPiece(3, 0, tensor)}, {"lanes": {"0": {}}}, keep=1)
    unequal = {row["what"]: row["largest difference"] for row in compare(one, other, 2) if not row["equal"]}
    assert unequal.keys() == {KINDS[kind], "lanes"}
    assert unequal[KINDS[kind]] == pytest.approx(2**-26)


def test_the_fault_drill_sees_steps_and_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sameness import compare, loss_difference

    one, other = finished_run(tmp_path / "one"), finished_run(tmp_path / "other")
    lines = (other / "log.jsonl").read_text().splitlines(keepends=True)
    (other / "log.jsonl").write_text(lines[0] + json.dumps({"step": 2, "loss": 0.5 * (1 + 1e-6)}) + "\n")
    assert [row["what"] for row in compare(one, other, 2) if not row["equal"]] == ["losses"]
    assert loss_difference(other, one) == pytest.approx(1e-6)
    (other / "log.jsonl").write_text("".join([*lines, lines[1]]))
    rows = [row["what"] for row in compare(one, other, 2) if not row["equal"]]
    assert rows == ["every step once in log.jsonl", "losses"]


def test_the_fault_drill_names_the_fix(tmp_path: Path) -> None:
    command = [BENCHMARKS / "fault_drill.py", "--shards", tmp_path, "--out", tmp_path]
    for arguments, said in (
        (["log.every=2"], "log.every: the drill sets this itself"),
        (["--ranks", "3"], "4 lanes cannot be shared evenly by 3 ranks"),
        ([], "manifest"),
    ):
        finished = processes.run(*command, *arguments)
        assert finished.returncode == 2 and said in finished.stderr, finished.stderr


def test_a_frame_of_play_is_timed(tmp_path: Path) -> None:
    config = small_config(actions=4)
    save_model_dir(tmp_path / "model", config, random_state(config), metadata_of(side=4))
    arguments = ("--threads", 1, "--steps", 1, 2, "--frames", 5, "--out", tmp_path / "results")
    finished = processes.run(BENCHMARKS / "play.py", tmp_path / "model", *arguments)
    (rows,) = tables_of(tmp_path / "results", finished).values()
    assert [row["steps"] for row in rows] == [1, 2]
    for row in rows:
        assert positive(row, "model p50", "decoder p50", "both p95", "cache MB") and len(row["model ms"]) == 5


def test_a_revisit_is_a_place_of_the_given_frames_that_left_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from revisits import revisits

    # Out along a corridor for six frames, back by the same places with the back turned, round, and out again.
    out = [(25.0 * step, 0.0, 359.0) for step in range(6)]
    back = [(25.0 * step, 0.0, 180.0) for step in reversed(range(6))]
    again = [(25.0 * step + 3.0, 2.0, 1.0) for step in range(6)]
    gaps, new = revisits(np.array(out + back + again), given=8, frames=10, window=4)
    assert new.tolist() == [True] * 4 + [False] * 6  # the way back looks the other way, and its first frame is given
    assert gaps.tolist() == [0] * 4 + [12] * 6
    waiting = [(0.0, 0.0, 0.0)] * 8
    gaps, new = revisits(np.array(waiting), given=4, frames=4, window=4)
    assert not gaps.any() and not new.any()  # every frame before the last four is in the window, too


def test_the_ratio_of_a_comparison_is_that_of_the_chosen_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from revisits import Side, comparison

    pixels = np.zeros((3, 2, 1, 1, 3), np.uint8)
    remembering = Side(np.array([[0.1, 9], [0.2, 0.4], [9, 9]]), np.full((3, 2), 0.5), pixels, pixels)
    forgetting = Side(np.array([[0.2, 9], [0.4, 0.8], [9, 9]]), np.full((3, 2), 0.5), pixels, pixels)
    chosen = np.array([[True, False], [True, True], [False, False]])
    row = comparison("revisited", chosen, remembering, forgetting)
    assert (row["frames"], row["clips"]) == (3, 2)
    assert [row[key] for key in ("with context", "without", "ratio", "ratio from", "to")] == pytest.approx(
        [0.7 / 3, 1.4 / 3, 0.5, 0.5, 0.5]
    )


def test_the_engine_walks_a_recorded_episode_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vizdoom")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from revisits import poses_of

    from far_scale.data.demo.episodes import record_episode
    from far_scale.data.demo.world import DemoWorld

    actions = record_episode(10000, 12).actions
    assert actions is not None
    poses = poses_of(10000, actions.tolist())
    with DemoWorld.of_seed(10000) as world:
        assert poses[0].tolist() == world.variables[:3].tolist()
        for action in actions[1:].tolist():
            world.step(action)
        assert poses[-1].tolist() == world.variables[:3].tolist() != poses[0].tolist()
