"""The planner: shapes without a shard set, times from a profile, limits, changes, and when to save."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from far_scale.config.recipe import check_ranks, load_recipe
from far_scale.distributed.process_group import Processes
from far_scale.model import FARConfig
from far_scale.train import setup
from far_scale.train.costs import attention_flops, forward_flops
from far_scale.train.curriculum import stages
from far_scale.train.planner.changes import Change, cheapest_change
from far_scale.train.planner.checkpoints import SaveTime, best_interval, measured_save, save_by_disk
from far_scale.train.planner.estimate import Cluster, RunPlan, plan_run
from far_scale.train.planner.forecast import Forecast
from far_scale.train.planner.measure import measured_shapes
from far_scale.train.planner.profile import Measurement, Profile, Settings, newest_profile, read_profile, short_name
from far_scale.train.planner.report import plan_lines, stage_limit
from far_scale.train.planner.shapes import StageShapes, draw_stages, local_sources
from far_scale.train.planner.time_model import Work, fit_seconds, pack_work, predict_seconds, sum_work
from far_scale.train.sharding import Sharding
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog, read_events
from harness.refusal import refused

SETTINGS = Settings("bf16", True, "flex", 3)
SECONDS = {"products": 2e-15, "attention": 4e-15, "layers": 1e-4, "state": 1e-11, "step": 0.01}


def profile(**changes: object) -> Profile:
    made = Profile(
        date="2026-11-26T10:00:00+00:00",
        hardware="NVIDIA H100 80GB HBM3",
        gpu="h100",
        ranks=1,
        versions={"torch": "2.13"},
        settings=SETTINGS,
        measurements=(Measurement("one", Work(1, 1, 1, 1, 1), 0.1),),
        coefficients=SECONDS,
        disk_write=1e9,
        disk_read=2e9,
        disk_folder="profiles",
    )
    return dataclasses.replace(made, **changes)


def plan(
    name: str, overrides: list[str], profiles: Path, nodes: int = 1, gpus: int = 8, memory: float = 80e9
) -> RunPlan:
    recipe = load_recipe(name, overrides)
    check_ranks(recipe, nodes * gpus)
    shapes = drawn(name, tuple(key for key in overrides if not key.startswith("train.")))
    cluster = Cluster(nodes, gpus, "h100", memory)
    return plan_run(recipe, cluster, local_sources(stages(recipe)), profiles, shapes=shapes)


@functools.cache
def drawn(name: str, keys: tuple[str, ...]) -> list[StageShapes]:
    """Packs depend on the data alone."""
    recipe = load_recipe(name, keys)
    return draw_stages(stages(recipe), local_sources(stages(recipe)), recipe.seed)


def test_packs_are_drawn_without_a_shard_set() -> None:
    recipe = load_recipe("far_xl_long")
    *_, last = stages(recipe)
    assert local_sources([last]) == {3: None}
    shapes = StageShapes.draw(last, None, recipe.seed)
    frames = [count for layout in shapes.layouts for count in layout.clip_frames]
    assert shapes.assumed and len(shapes.layouts) == 256
    assert 16 <= min(frames) < 60 and 250 < max(frames) <= 300
    budget = last.data.tokens_per_pack
    assert budget is not None and 0.98 * budget < shapes.largest.tokens <= budget
    assert shapes.step_flops == pytest.approx(8 * shapes.mean(lambda layout: 3 * forward_flops(last.config, layout)))


def test_work_counts_what_is_computed_again() -> None:
    config = FARConfig(4, 3, window=4, context_patch=4)
    layout = config.layout((9, 3), (8, 8))
    attention = attention_flops(config, layout)
    products = forward_flops(config, layout) - attention
    none, kept, full = (pack_work(config, layout, mode, flex=False) for mode in ("none", "attention-kept", "full"))
    assert [none.products, kept.products, full.products] == [3 * products, 4 * products, 4 * products]
    assert [none.attention, kept.attention, full.attention] == [3 * attention, 3 * attention, 4 * attention]
    assert pack_work(config, layout, "attention-kept", flex=True).attention == 4 * attention
    # Attention is all that does not grow with the tokens alone.
    layers = config.layers
    pairs = layers * layout.window_pairs + (layers - 1) * layout.context.pairs
    assert attention == 4 * config.width * pairs


def test_the_fit_finds_the_seconds_of_each_kind_of_work() -> None:
    true = {"products": 3e-12, "attention": 5e-12, "layers": 2e-3, "state": 4e-10}
    works = [
        pack_work(FARConfig(layers, heads), FARConfig(layers, heads).layout((frames,) * clips, (8, 8)), "none", False)
        for layers, heads, frames, clips in [(2, 2, 4, 1), (2, 4, 8, 2), (4, 2, 16, 1), (3, 6, 2, 4), (1, 8, 12, 1)]
    ]
    works = [dataclasses.replace(work, state=1e6 * number**2) for number, work in enumerate(works, start=1)]
    found = fit_seconds(works, [predict_seconds(true, work) for work in works])
    for work in works:
        assert predict_seconds(found, work) == pytest.approx(predict_seconds(true, work), rel=1e-6)
    assert min(found.values()) >= 0 and "between" not in found
    # Less time for more work is no negative time for a unit of it.
    assert fit_seconds([Work(1, 0, 0, 0, 0, step=0), Work(2, 0, 0, 0, 0, step=0)], [2.0, 1.0])["products"] >= 0


def test_the_newest_profile_of_the_same_settings_is_taken(tmp_path: Path) -> None:
    none, why = newest_profile(tmp_path, "h100", SETTINGS)
    assert none is None and "no profile of h100 with train.precision=bf16 train.compile=true" in why
    assert "(none); far-scale plan RECIPE --measure" in why
    older = profile().write(tmp_path)
    newer = profile(date="2026-11-27T10:00:00+00:00").write(tmp_path)
    profile(date="2026-11-28T10:00:00+00:00", settings=dataclasses.replace(SETTINGS, zero_stage=1)).write(tmp_path)
    found, line = newest_profile(tmp_path, "h100", SETTINGS)
    assert found == read_profile(newer) != read_profile(older)
    assert line == f"{newer}: NVIDIA H100 80GB HBM3, 2026-11-27, 1 measured steps on 1 rank"
    _, why = newest_profile(tmp_path, "h100", dataclasses.replace(SETTINGS, precision="fp32"))
    assert "(only with train.precision=bf16" in why
    (tmp_path / "other.json").write_text(json.dumps({"format": "far_scale.profile/1"}))
    with pytest.raises(
        UserError, match=r"other\.json: not a profile of this version .*; write one with far-scale plan"
    ):
        newest_profile(tmp_path, "h100", SETTINGS)


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GH200 480GB", "nvidia-gh200-480gb"),
    ],
)
def test_short_names(hardware: str, name: str) -> None:
    assert short_name(hardware) == name


def test_no_time_without_a_profile(tmp_path: Path) -> None:
    without = plan("far_b_ucf101_64", [], tmp_path)
    assert without.seconds is None and without.fits
    text = "\n".join(plan_lines(without))
    assert "not predicted: " in text and "days" not in text and "GPU-hours" not in text
    assert stage_limit(without, without.stages[0]) == "-"


def test_times_come_from_the_profile(tmp_path: Path) -> None:
    profile().write(tmp_path)
    planned = plan("far_b_ucf101_64", [], tmp_path)
    (stage,) = planned.stages
    assert stage.step_seconds == pytest.approx(predict_seconds(SECONDS, stage.work), rel=1e-9)
    assert planned.seconds == pytest.approx(stage.shapes.stage.steps * stage.step_seconds)
    assert stage_limit(planned, stage) == "compute"
    # 32 clips of 16 frames of 32 x 8 x 8 numbers of 2 bytes
    assert stage.bytes_read == 32 * 16 * 32 * 8 * 8 * 2
    assert planned.checkpoint_bytes == 16 * planned.parameters
    assert not planned.knows_links  # the profile is of one rank
    text = "\n".join(plan_lines(planned))
    assert "GPU-hours" in text and "it has no links like these" in text
    slow = profile(date="2026-11-27T10:00:00+00:00", disk_read=1e6)
    slow.write(tmp_path)
    by_data = plan("far_b_ucf101_64", [], tmp_path)
    assert stage_limit(by_data, by_data.stages[0]) == "data"
    profile(date="2026-11-28T10:00:00+00:00", coefficients={**SECONDS, "within": 1e-6}).write(tmp_path)
    by_links = plan("far_b_ucf101_64", [], tmp_path)
    assert by_links.knows_links and stage_limit(by_links, by_links.stages[0]) == "links"


def change_for(name: str, overrides: list[str], memory: float, folder: Path) -> tuple[RunPlan, Change | None]:
    recipe = load_recipe(name, overrides)

    def replan(more: tuple[str, ...], nodes: int) -> RunPlan:
        return plan(name, [*overrides, *more], folder, nodes, gpus=2, memory=memory)

    return replan((), 1), cheapest_change(replan((), 1), recipe.train, recipe.data, recipe.curriculum, replan)


@pytest.mark.slow
def test_the_cheapest_change_that_fits(tmp_path: Path) -> None:
    """Without a profile the cost is the arithmetic: smaller or shared packs take no more, recomputation a third."""
    keys = ["train.zero_stage=1", "data.lanes=2", "data.clips_per_pack=16"]
    planned, change = change_for("far_xl_ucf101_256_uncond", keys, 30e9, tmp_path)
    assert not planned.fits and stage_limit(planned, planned.stages[0]) == "memory"
    assert change is not None and change.plan.fits
    assert change.overrides == ("data.lanes=4", "data.clips_per_pack=8")
    odd = ["train.zero_stage=3", "data.lanes=2", "data.clips_per_pack=25"]
    _, change = change_for("far_xl_ucf101_256_uncond", odd, 30e9, tmp_path)
    assert change is not None and change.plan.fits
    assert change.overrides == ("train.sequence_parallel=2",) and change.nodes == 1
    shared = [*odd[:2], "data.clips_per_pack=51", "train.sequence_parallel=2"]  # four ranks would cross nodes of two
    _, change = change_for("far_xl_ucf101_256_uncond", shared, 30e9, tmp_path)
    assert change is not None and change.plan.fits
    assert change.overrides == ("train.activation_checkpointing=full",) and change.nodes == 1
    _, change = change_for("far_b_ucf101_64", ["train.activation_checkpointing=full"], 1e9, tmp_path)
    assert change is None


def test_the_interval_of_young_and_daly() -> None:
    interval = best_interval(SaveTime(20, 60, ""), 24 * 3600)
    assert interval.young == pytest.approx(math.sqrt(2 * 20 * 86400))
    ratio = 20 / (2 * 86400)
    assert interval.daly == pytest.approx(interval.young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - 20)
    assert interval.seconds == interval.daly
    lost = 20 / (interval.daly + 20) + (interval.daly / 2 + 60) / 86400
    assert interval.goodput == pytest.approx(1 - lost)

    def loss(seconds: float) -> float:  # of time, to the first order
        return 20 / seconds + seconds / (2 * 86400)

    assert all(loss(interval.young) <= loss(factor * interval.young) for factor in (0.5, 0.9, 1.1, 2))
    assert best_interval(SaveTime(1, 9000, ""), 3600).seconds == 9000  # no save ends earlier
    assert best_interval(SaveTime(10000, 10000, ""), 3600).daly == 3600


def test_the_time_of_a_save(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint was saved according to its events"):
        measured_save(tmp_path)
    events = EventLog(tmp_path, True)
    for step, (stall, seconds) in enumerate([(2.0, 30.0), (1.0, 20.0), (9.0, 90.0)]):
        events.emit("saved", step, "", stall_seconds=stall, seconds=seconds)
    save = measured_save(tmp_path)
    assert (save.waiting, save.seconds) == (2.0, 30.0) and save.source == f"median of 3 saves in {tmp_path}"
    assert save_by_disk(2e9, 1e9, "").waiting == 2.0


def test_measured_shapes_are_smaller_than_the_recipe() -> None:
    config = FARConfig(28, 18, context_patch=4)
    shapes = measured_shapes(config, config.layout((40, 20, 16), (8, 8)))
    assert len({(c.layers, c.heads) for c, _ in shapes}) == 3 and len(shapes) == 9
    assert {pack for _, pack in shapes} == {(40, 20, 16), (40, 20), (40,)}
    assert all(c.layers <= 4 and c.context_patch == 4 for c, _ in shapes)
    assert len(measured_shapes(FARConfig(1, 1), FARConfig(1, 1).layout((4,), (4, 4)))) == 1


def test_a_start_compares_its_first_steps_with_the_prediction(tmp_path: Path) -> None:
    recipe = load_recipe("demo_cpu")
    config, alone = recipe.far_config(), Processes(0, 1, torch.device("cpu"))
    layout = config.layout((16, 16), (8, 8))
    forecast = Forecast(
        config, recipe.train, Sharding(3), [1000], False, [], profile(), alone, EventLog(tmp_path, True)
    )  # fmt: skip
    for step in range(1, 30):
        forecast.end_step(step, [layout])
    (event,) = read_events(tmp_path)
    assert event["event"] == "forecast" and event["step"] == 20
    update = Work(0, 0, 0, 0, state=1000)
    work = sum_work([pack_work(config, layout, "none", False), update])
    assert event["seconds"]["predicted"] == pytest.approx(predict_seconds(SECONDS, work))
    assert event["memory"]["ema"] == 4000 and event["memory"]["peak"] > event["memory"]["saved"] > 0
    other = Forecast(config, recipe.train, Sharding(3), [1000], False, [], None, Processes(1, 2, alone.device), None)
    other.end_step(1, [layout])  # not the main process


def test_memory_is_refused_by_exact_bytes_and_warned_of_by_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, sizes, free = load_recipe("demo_cpu", ["train.zero_stage=0"]).train, [1_000_000], [0.0]
    monkeypatch.setattr(setup, "all_gather_objects", lambda value, group: [value, 1e12])
    monkeypatch.setattr(setup, "free_memory", lambda processes: free[0])
    processes = cast("Processes", SimpleNamespace(world_size=2, host_group=None, is_main_process=True))

    def check(activations: float) -> None:
        setup.check_memory(train, sizes, Sharding(0), processes, activations, packs_per_step=1)

    free[0] = 19e6  # weights, two moments and EMA are 16 MB, the gradients at Adam's step 4 MB
    check(0)
    assert "warning: a rank needs about 0.0 GB" in capsys.readouterr().err
    free[0] = 40e6
    check(10e6)
    assert capsys.readouterr().err == ""
    check(21e6)
    assert "it may run out of memory" in capsys.readouterr().err
    free[0] = 15e6
    refused(lambda: check(0), "weights, optimizer and EMA: a rank needs 0.0 GB", "far-scale plan")
