"""Stages: what they are, what they cost, and training through them with real processes, killed and resumed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.config.schema import ObjectiveSection
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, save_model_dir
from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes
from far_scale.model import FAR, FARConfig
from far_scale.train.checkpoint import read_state, step_folder
from far_scale.train.costs import forward_flops
from far_scale.train.curriculum import Stage, stage_of, stages
from far_scale.train.engine import build_model
from far_scale.train.flow_matching import NoisyPack, add_noise, pack_loss
from far_scale.train.lr_schedule import learning_rate
from far_scale.train.resume_checks import check_fits
from far_scale.train.shard_sets import open_sets
from far_scale.train.start_weights import load_start_weights
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog
from harness.processes import launch, run, start_ranks

pytestmark = pytest.mark.slow

# Windows of 8 of at most 24 frames, 16 tokens a window frame and 4 a context frame. Checkpoints: in stage 2, at the
# boundary of stages 2 and 3, and within stage 3, where clips wait for a pack they fit.
CURRICULUM = """\
extends: demo_cpu
name: staged
model: {layers: 2, heads: 2, window: 8, context_patch: 4}
data: {lanes: 2, shuffle_window: 4}
train: {steps: null, zero_stage: 3}
optimizer: {warmup_steps: 2}
log: {every: 1}
checkpoint: {every: 4, keep: 9}
curriculum:
  - {name: images, steps: 2, frames: {1: 0.5, 4: 0.5}, tokens_per_pack: 200}
  - {steps: 6, frames: {4: 0.5, 20: 0.5}, clips_per_pack: 1, learning_rate_scale: 0.5}
  - {name: long, steps: 8, frames: [4, 24], window: 4, tokens_per_pack: 400}
"""


def opened(stage: Stage) -> ShardSet:
    """A stage's shard set, as this process opens it alone."""
    alone = Processes(0, 1, torch.device("cpu"))
    return open_sets(stage.data, [stage], alone, EventLog(Path("."), is_main_process=False), 0).by_stage[stage.index]


@pytest.fixture(scope="module")
def folder(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with staged.yaml, whose shards are the recorded ones."""
    folder = tmp_path_factory.mktemp("curriculum")
    (folder / "staged.yaml").write_text(CURRICULUM.replace("data: {", f"data: {{shards: {recorded_shards}, "))
    return folder


def training(folder: Path, run: str) -> list[str]:
    return ["-m", "far_scale.train", str(folder / "staged.yaml"), f"run_dir={folder / run}"]


def train(folder: Path, run: str, ranks: int) -> str:
    """Train to the end; returns what was printed."""
    finished = launch(ranks, *training(folder, run))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout + finished.stderr


def train_until_killed(folder: Path, run: str, ranks: int, step: int) -> None:
    """Kill -9 all processes as soon as the checkpoint of `step` is there."""
    started = start_ranks(ranks, *training(folder, run))
    latest, deadline = folder / run / "checkpoints" / "latest", time.monotonic() + 120
    while not latest.exists() or latest.read_text() != f"step-{step:08d}\n":
        assert started[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    started.kill()
    started.wait()
    assert latest.read_text() == f"step-{step:08d}\n"


def log_of(folder: Path, run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the undisturbed run on 2 ranks printed."""
    return train(folder, "whole", 2)


def test_killed_at_a_stage_boundary_and_in_mid_stage(folder: Path, printed: str) -> None:
    train_until_killed(folder, "killed", 2, step=8)
    train_until_killed(folder, "killed", 2, step=12)
    train(folder, "killed", 2)
    whole, killed = log_of(folder, "whole"), log_of(folder, "killed")
    assert [line["step"] for line in killed] == list(range(1, 17))
    for key in ("loss", "grad_norm", "learning_rate", "stage"):
        assert [line[key] for line in whole] == [line[key] for line in killed]
    states = [
        json.loads((folder / run / "checkpoints/step-00000012/state.json").read_text()) for run in ("whole", "killed")
    ]
    assert states[0]["lanes"] == states[1]["lanes"] and states[0]["lanes"]["0"]["pending"]
    assert (states[0]["stage"], states[0]["model"]["window"]) == (2, 4)


def test_one_rank_trains_the_same(folder: Path, printed: str) -> None:
    """Also where one rank's pack has a context and the other's has none, and where packs hold unlike many clips."""
    plan = stages(load_recipe(folder / "staged.yaml"))
    shard_set = opened(plan[1])
    with_context, clips = [], []
    for stage in plan[1:]:
        lanes = stage.packing(0).make_lanes(shard_set, range(2))
        for _ in range(stage.steps):
            packs = [tuple(clip.frames for clip in next(lanes[lane])) for lane in range(2)]
            with_context.append({stage.layout(pack).context.frames > 0 for pack in packs})
            clips.append({len(pack) for pack in packs})
    assert {True, False} in with_context and {False} in with_context
    assert any(len(counts) == 2 for counts in clips)

    train(folder, "alone", 1)
    both = [torch.tensor([line["loss"] for line in log_of(folder, run)]) for run in ("whole", "alone")]
    torch.testing.assert_close(both[1], both[0], rtol=1e-5, atol=0)


def test_stages_before_a_checkpoint_cannot_change(folder: Path, printed: str) -> None:
    recipe = load_recipe(folder / "staged.yaml", ["curriculum=[{steps: 14}, {steps: 2, frames: 8}]"])
    checkpoint = step_folder(folder / "whole", 12)
    with pytest.raises(UserError, match="written in stage 3 of a curriculum, by the recipe step 12 is of stage 1; the"):
        check_fits(checkpoint, read_state(checkpoint), stages(recipe))


def test_the_log_shows_the_stage(folder: Path, printed: str) -> None:
    lines = log_of(folder, "whole")
    assert [line["stage"] for line in lines] == [1] * 2 + [2] * 6 + [3] * 8
    assert [line["stage_name"] for line in lines[1:4]] == ["images", "stage-2", "stage-2"]
    assert "stage 2/3 (stage-2): steps 3 to 8" in printed and "step 9/16  long  loss" in printed
    recipe = load_recipe(folder / "staged.yaml")
    for line in lines:
        scale = 0.5 if line["stage"] == 2 else 1.0
        assert (
            line["learning_rate"] == learning_rate(recipe.optimizer, recipe.train.steps, int(line["step"]) - 1) * scale
        )


def test_the_loss_is_the_mean_over_the_clips_of_the_global_batch(folder: Path, printed: str) -> None:
    """At the first step the model still answers zero, so each clip's loss is the mean square of its target."""
    recipe = load_recipe(folder / "staged.yaml")
    stage = stages(recipe)[0]
    shard_set = opened(stage)
    scaling = LatentScaling.of(shard_set.manifest, recipe.data.scaling)
    with PackLoader(shard_set, scaling, [0, 1], stage.packing(recipe.seed)) as loader:
        packs = next(loader)
    assert len(packs[0].clip_frames) != len(packs[1].clip_frames)
    losses = []
    for pack in packs:
        noisy = add_noise(pack, recipe.objective, stage.config, recipe.seed)
        losses += [pack_loss(torch.zeros_like(clip.target), clip).item() for clip in clips_of(noisy, stage.config)]
    assert log_of(folder, "whole")[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def clips_of(noisy: NoisyPack, config: FARConfig) -> list[NoisyPack]:
    """Each clip of a noisy pack as a pack of its own."""
    parts, frame, window_frame = [], 0, 0
    size = (noisy.latents.shape[2], noisy.latents.shape[3])
    for clip, count in enumerate(noisy.layout.clip_frames):
        layout = config.layout((count,), size)
        rows, window_rows = slice(frame, frame + count), slice(window_frame, window_frame + layout.window.frames)
        parts.append(
            NoisyPack(
                latents=noisy.latents[rows],
                timesteps=noisy.timesteps[rows],
                target=noisy.target[window_rows],
                has_loss=noisy.has_loss[window_rows],
                actions=None if noisy.actions is None else noisy.actions[rows],
                labels=None if noisy.labels is None else noisy.labels[clip : clip + 1],
                layout=layout,
            )
        )
        frame, window_frame = rows.stop, window_rows.stop
    return parts


@pytest.mark.parametrize("condition", ["actions", "labels"])
def test_the_same_clips_give_the_same_loss_packed_or_one_by_one(condition: str) -> None:
    config = FARConfig(layers=2, heads=2, channels=4, window=6, context_patch=4, **{condition: 3})
    generator = torch.Generator().manual_seed(0)
    model = FAR(config)
    for parameter in model.parameters():  # the first weights give zero whatever is seen
        parameter.data.normal_(std=0.1, generator=generator)
    clip_frames = (3, 20, 6, 9, 1)
    pack = Pack(
        latents=torch.randn(sum(clip_frames), 4, 8, 8, generator=generator),
        actions=torch.randint(3, (sum(clip_frames),), generator=generator),
        labels=torch.randint(3, (len(clip_frames),), generator=generator),
        clip_frames=clip_frames,
        keys=("",) * len(clip_frames),
        lane=0,
        step=0,
        lane_state={},
    )
    noisy = add_noise(pack, ObjectiveSection(), config, seed=0)

    def loss(part: NoisyPack) -> torch.Tensor:
        return pack_loss(model(part.latents, part.timesteps, part.actions, part.labels, part.layout), part)

    packed = loss(noisy)
    one_by_one = torch.stack([loss(part) for part in clips_of(noisy, config)]).mean()
    assert torch.autograd.grad(packed, model.context_patch_embedding.weight)[0].abs().max() > 0
    torch.testing.assert_close(packed, one_by_one, rtol=1e-6, atol=0)


def test_stages_of_a_recipe(folder: Path) -> None:
    plan = stages(load_recipe(folder / "staged.yaml"))
    assert [(stage.name, stage.first, stage.end) for stage in plan] == [
        ("images", 0, 2),
        ("stage-2", 2, 8),
        ("long", 8, 16),
    ]
    assert [stage_of(plan, step).index for step in (0, 1, 2, 7, 8, 15)] == [0, 0, 1, 1, 2, 2]
    assert [stage.config.window for stage in plan] == [8, 8, 4]
    assert plan[2].clip_tokens(24) == 4 * 16 + 20 * 4 == plan[2].layout((24,)).tokens
    (only,) = stages(load_recipe("demo_cpu"))
    assert (only.first, only.end, only.learning_rate_scale) == (0, 1500, 1.0)


@pytest.mark.parametrize("clip_frames", [(20, 3), (4, 4), (9,)])
def test_counted_arithmetic_is_the_models(clip_frames: tuple[int, ...]) -> None:
    config = FARConfig(layers=3, heads=2, channels=4, window=6, context_patch=4, actions=4)
    layout, frames = config.layout(clip_frames, (8, 8)), sum(clip_frames)
    model = FAR(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(frames, 4, 8, 8), torch.zeros(frames), torch.zeros(frames, dtype=torch.int64), None, layout)
    products = {name: flops for name, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(name)}
    attention = 4 * config.width * (2 * layout.attended_pairs + layout.window_pairs)
    assert sum(products.values()) + attention == forward_flops(config, layout)


def test_dry_run_prints_a_table_of_stages(folder: Path) -> None:
    finished = run(*training(folder, "dry"), "--dry-run")
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = finished.stdout.splitlines()
    (header,) = (number for number, line in enumerate(lines) if line.startswith("stage "))
    for column in ("frames", "tokens a pack", "attended pairs", "TFLOP/step", "GB", "s/step", "limit"):
        assert column in lines[header]
    rows = lines[header + 1 : header + 4]
    assert [row.split()[:2] for row in rows] == [["images", "2"], ["stage-2", "6"], ["long", "8"]]
    assert "4-24" in rows[2] and "/ 400" in rows[2]
    assert "saved activations" in finished.stdout and "time        not predicted: profiles/ has no" in finished.stdout
    for name in ("images", "stage-2", "long"):
        assert f"one batch   of {name}: loss" in finished.stdout
    assert not (folder / "dry").exists()


def saved_model(folder: Path, recipe: Recipe, **changes: int) -> tuple[FAR, Path]:
    """A model directory of the recipe's model (with changes) and weights of another seed."""
    torch.manual_seed(5)
    model = FAR(FARConfig(**{**recipe.far_config().to_dict(), **changes}))
    model.output.out.weight.data.normal_()
    card = ModelMetadata(
        autoencoder=AutoencoderInfo(name="compact-vizdoom-f8c32", weight_hash="0" * 64, scaling_factor=1.0),
        scaling=LatentScaling((0.0,) * 32, (1.0,) * 32),
        latent_shape=(32, 8, 8),
        fps=None,
        training=TrainingMetadata(step=1, recipe_hash="", weights="ema", far_scale=""),
    )
    save_model_dir(folder, model.config, model.state_dict(), card)
    return model, folder


def test_training_starts_from_the_weights_of_a_model_directory(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "staged.yaml")
    saved, model_dir = saved_model(tmp_path / "model", recipe, window=5)
    model = build_model(recipe.far_config(), recipe.seed)
    load_start_weights(model, str(model_dir))
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    _, other = saved_model(tmp_path / "other", recipe, layers=1)
    with pytest.raises(UserError, match=r"train\.start_from=.*other: that model's layers is 1, .* has 2; make"):
        load_start_weights(model, str(other))


def test_a_stage_whose_shard_set_does_not_fit_is_refused(folder: Path) -> None:
    plan = stages(load_recipe(folder / "staged.yaml"))
    assert isinstance(opened(plan[0]), ShardSet)
    bad = load_recipe(folder / "staged.yaml", ["curriculum=[{steps: 4, frames: 25}]"])
    with pytest.raises(UserError, match="shortest sample has 24 frames and 25 are needed"):
        opened(stages(bad)[0])
