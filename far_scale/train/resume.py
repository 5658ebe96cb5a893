"""What a checkpoint holds of a run, and how a run goes on from it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import far_scale
from far_scale.config.recipe import Recipe
from far_scale.convert.model_dir import load_model
from far_scale.data.loader.mixture import Mixture, MixtureManifest
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.records import classes_differ
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes, all_gather_objects, broadcast_from_main
from far_scale.model import FAR, FARConfig
from far_scale.train import checkpoint
from far_scale.train.changes import changes
from far_scale.train.checkpoint import FlatPiece, local
from far_scale.train.checkpoint.run_dir import latest_stamp, named_step, no_step_up_to, run_identity, steps_there
from far_scale.train.curriculum import Stage, stage_of
from far_scale.train.deepspeed_adapter import use_loaded_weights, whole_shape
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments, set_adam_step
from far_scale.train.lanes_again import LaneStates, resume_lanes
from far_scale.train.step_guard import StepGuard
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog

_ALL_DAMAGED = (
    "{}/checkpoints: every checkpoint is damaged; repair one and take .damaged off its name, or remove this folder to "
    "train from the start"
)


@dataclass(frozen=True)
class Position:
    """Where a run goes on.

    Attributes:
        step: steps done.
        lanes: the lanes' states after them; None where each lane begins.
        guard: the guard's state after them, or None.
        beginnings: how the lanes began after their number had changed in this stage, as in `PackingConfig`.
        lanes_changed: whether it changes now, or how the lanes' packs are filled.
    """

    step: int = 0
    lanes: LaneStates | None = None
    guard: dict[str, Any] | None = None
    beginnings: tuple[Mapping[str, Any], ...] = ()
    lanes_changed: bool = False


def run_metadata(
    recipe: Recipe,
    model: FAR,
    manifest: Manifest | MixtureManifest,
    scaling: LatentScaling,
    processes: Processes,
) -> dict[str, Any]:
    """The part of state.json that stays the same over a run; the other part is `stage_metadata`.

    Together they are enough to export the model without the run's data. Call it before the engine shards `model`:
    afterwards the parameters' shapes are gone.

    Args:
        manifest: of data.shards, whose autoencoder and scaling hold for all stages.
    """
    return {
        **_named(manifest),
        "parameters": {name: list(shape) for name, shape in parameter_shapes(model).items()},
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.hash(),
        "autoencoder": manifest.autoencoder.model_dump(mode="json"),
        "scaling": scaling.to_dict(),
        "frame_stride": recipe.data.frame_stride,
        "ranks": processes.world_size,
        "versions": {
            "far_scale": far_scale.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
    }


def stage_metadata(stage: Stage, manifest: Manifest | MixtureManifest) -> dict[str, Any]:
    """The part of state.json that may change with the stage; `manifest` is that of the stage's shard set."""
    return {
        **_named(manifest),
        "stage": stage.index,
        "model": stage.config.to_dict(),
        "latent_shape": list(manifest.latent_shape),
        "fps": manifest.fps,
        "shard_set": manifest.fingerprint(),
    }


def _named(manifest: Manifest | MixtureManifest) -> dict[str, Any]:
    """The names of the labels' classes, where they are known."""
    return {} if manifest.classes is None else {"classes": list(manifest.classes)}


def load_start_weights(model: FAR, folder: str) -> None:
    """Put the weights of a model directory into `model`, before the engine shards it.

    Raises:
        UserError: it is no model directory, or one of another shape.
    """
    found = load_model(folder, dtype=torch.float32)
    own, theirs = asdict(model.config), asdict(found.config)
    # These change nothing that is stored.
    free = ("window", "condition_dropout", "causal")
    differing = [key for key in own if key not in free and own[key] != theirs[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"train.start_from={folder}: that model's {key} is {theirs[key]}, the recipe's model has {own[key]}; "
            "make the recipe's model section fit it, or start from another"
        )
    model.load_state_dict(found.state_dict())


def parameter_shapes(model: FAR) -> dict[str, torch.Size]:
    """Shapes of the whole parameters by name, before or after ZeRO-3 has cut them."""
    return {name: whole_shape(parameter) for name, parameter in model.named_parameters()}


def pieces(engine: Any, ema: ShardedEMA) -> dict[str, FlatPiece]:
    """This rank's pieces of all that training changes, by the names they are stored under."""
    own = {}
    for fragment, average in zip(fragments(engine), ema.weights, strict=True):
        tensors = {
            "weight": fragment.weight,
            "exp_avg": fragment.exp_avg,
            "exp_avg_sq": fragment.exp_avg_sq,
            "ema": average,
        }
        for kind, tensor in tensors.items():
            own[f"{kind}/{fragment.name}"] = FlatPiece(fragment.size, fragment.offset, tensor)
    return own


class Resume:
    """Finds the checkpoint that a run goes on from, checks that it may, and loads it.

    Args:
        recipe: the run's.
        plan: its stages.
        processes: who runs it.
        events: where damage and changes are told.
    """

    def __init__(self, recipe: Recipe, plan: list[Stage], processes: Processes, events: EventLog) -> None:
        self._recipe, self._plan, self._processes, self._events = recipe, plan, processes, events
        self._run = Path(recipe.run_dir)
        self.latest = broadcast_from_main(lambda: latest_stamp(self._run), processes)
        """`latest_stamp` of the run when it started, before damage could change it."""

    def newest_whole(self) -> int:
        """The step of the newest checkpoint in the run directory that is not damaged; 0 where there is none yet.

        The ranks share the work of checking it. Damaged ones are told, and set aside.

        Raises:
            UserError: all there are are damaged, or all up to the one that `latest` names.
        """
        group = self._processes.host_group
        steps, named = broadcast_from_main(self._steps_to_try, self._processes)
        for number, step in enumerate(steps):
            folder = checkpoint.step_folder(self._run, step)
            found = all_gather_objects(
                checkpoint.damage(folder, self._processes.rank, self._processes.world_size), group
            )
            problem = next((line for line in found if line is not None), None)
            if problem is None:
                if self._processes.is_main_process and step != named:
                    if number == 0:
                        latest = f"{self._run}/checkpoints/latest"
                        what = (
                            f"{latest} is missing" if named is None else f"the checkpoint that {latest} names is gone"
                        )
                        self._events.emit("latest", step, f"{what}; going on from the newest, step {step}")
                    checkpoint.point_at(folder)
                return step
            before = f"going on from step {steps[number + 1]}" if number + 1 < len(steps) else "there is none before"
            if self._processes.is_main_process:
                aside = checkpoint.quarantine(folder)
                self._events.emit("damaged", step, f"damaged checkpoint: {problem}; now {aside.name}; {before}")
        if steps:
            later = broadcast_from_main(lambda: steps_there(self._run), self._processes)
            raise UserError(no_step_up_to(self._run, steps[0], later) if later else _ALL_DAMAGED.format(self._run))
        return 0

    def _steps_to_try(self) -> tuple[list[int], int | None]:
        """See `steps_to_try`, and the step that `latest` names.

        Raises:
            UserError: `latest` is not readable, or all checkpoints are gone or damaged.
        """
        steps, named = checkpoint.steps_to_try(self._run), named_step(self._run)
        if not steps and any((self._run / "checkpoints").glob("step-*.damaged")):
            raise UserError(_ALL_DAMAGED.format(self._run))
        return steps, named

    def check_start_from(self, step: int, accept_changes: bool) -> None:
        """Refuse start weights for a run that has checkpoints and started from others: they would not be read.

        Args:
            step: of the newest whole checkpoint, or 0.
            accept_changes: say it only.

        Raises:
            UserError: names what the run started from.
        """
        asked = self._recipe.train.start_from
        if asked is None or step == 0:
            return
        where = checkpoint.step_folder(self._run, step)
        before = checkpoint.read_state(where)["recipe"]["train"].get("start_from")
        if before is not None and Path(before).resolve() == Path(asked).resolve():
            return
        what = "random weights" if before is None else before
        problem = f"train.start_from={asked}: not read, since {where} is there and the run started from {what}"
        if not accept_changes:
            fix = "use another run_dir to start from these weights, or leave the key as it was to go on"
            raise UserError(f"{problem}; {fix}")
        self._events.emit("accepted-changes", step, problem, changes=[f"train.start_from {before} -> {asked}"])

    def restore(
        self,
        step: int,
        engine: Any,
        ema: ShardedEMA,
        local_folder: Path | None,
        card: dict[str, Any],
        stage_cards: dict[int, dict[str, Any]],
        sources: Mapping[int, ShardSet | Mixture],
        accept_changes: bool,
    ) -> Position:
        """Load a checkpoint into engine and EMA: that of `step` in the run directory, or a later node-local one.

        Args:
            step: of the newest whole checkpoint, or 0.
            engine, ema: what to load into.
            local_folder: this run's on the node's own disk, or None.
            card, stage_cards: what this run would write into its own checkpoints, by `run_metadata` and, for the stages
                that are not over, `stage_metadata`.
            sources: what the stages read that are to come.
            accept_changes: go on even where something has changed that makes another result.

        Raises:
            UserError: it was written by another model, or by another recipe and that is not accepted.
        """
        own, who = pieces(engine, ema), (self._processes.rank, self._processes.world_size)
        later = None
        if local_folder is not None:
            later = local.newest(local_folder, step, *who, own, self.latest, self._processes.host_group)
        if later is not None and local_folder is not None:
            where, state = local_folder, local.read_state(local_folder, later, *who)
        elif step:
            where = checkpoint.step_folder(self._run, step)
            state = checkpoint.read_state(where)
        else:
            return Position()
        check_fits(where, state, self._recipe, self._plan)
        if self._recipe.model.condition == "label":
            check_same_classes(where, state, {**card, **stage_cards.get(state["stage"], {})})
        lanes = resume_lanes(where, state, self._recipe, self._plan, sources)
        self._compare(where, state, {**card, **stage_cards.get(state["stage"], {})}, lanes.change, accept_changes)
        if later is not None:
            local.load(where, later, *who, own)
        else:
            checkpoint.load(where, own)
        guard = state.get("guard")
        set_adam_step(engine, state["step"] if guard is None else guard["updates"])
        use_loaded_weights(engine)
        self._events.emit("resumed", state["step"], f"going on from step {state['step']} of {where}")
        return Position(state["step"], lanes.states, guard, lanes.beginnings, lanes.change is not None)

    def roll_back(self, done: int, engine: Any, ema: ShardedEMA, guard: StepGuard) -> None:
        """After too many skipped steps: go back to the weights, moments and EMA of the newest checkpoint.

        Steps and data go on, past the batches that were skipped.

        Args:
            done: steps done.
            engine, ema: what to load into.
            guard: which counted the steps; it counts anew.

        Raises:
            UserError: there is no checkpoint, or it was written by the last roll-back and no step since was good.
        """
        row = f"step {done}: {guard.in_row} steps in a row were skipped"
        look = f"{self._run}/events.jsonl names them and their samples; lower optimizer.learning_rate or mend the data"
        step = self.newest_whole()
        if step == 0:
            raise UserError(f"{row}, and there is no checkpoint to go back to: {look}")
        folder = checkpoint.step_folder(self._run, step)
        state = checkpoint.read_state(folder)
        before: dict[str, Any] = state.get("guard") or {"updates": step}
        if state.get("went_back") and before["updates"] == guard.updates:
            raise UserError(f"{row}, straight after going back for the same reason: {look}")
        checkpoint.load(folder, pieces(engine, ema))
        guard.updates = before["updates"]
        guard.forget_row()
        set_adam_step(engine, guard.updates)
        use_loaded_weights(engine)
        self._events.emit("rolled-back", done, f"{row}; going on with the weights of step {step}", weights_of=step)

    def _compare(
        self, where: Path, state: dict[str, Any], now: dict[str, Any], of_lanes: str | None, accept: bool
    ) -> None:
        found = changes(state, now, self._recipe)
        of_result = found.of_result
        if of_lanes is not None:
            of_result = [of_lanes, *(line for line in of_result if not line.startswith("data.lanes "))]
        if of_result and not accept:
            raise UserError(
                f"{where}: since this checkpoint has changed, and would change the result: "
                f"{'; '.join(of_result)}; start with --accept-changes to go on all the same, or use another "
                "run_dir"
            )
        for event, lines in (("accepted-changes", of_result), ("harmless-changes", found.harmless)):
            if lines:
                what = "other results accepted" if event == "accepted-changes" else "the same result but for rounding"
                text = f"changed since the checkpoint ({what}): {'; '.join(lines)}"
                self._events.emit(event, state["step"], text, changes=lines)


def identity(run: Path, processes: Processes, events: EventLog) -> str:
    """The run's identity, see `run_identity`, on all processes; that the directory is a copy is an event."""
    own, copied = broadcast_from_main(lambda: run_identity(run), processes)
    if copied is not None:
        events.emit("copied", 0, copied)
    return own


def check_same_classes(where: Path, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError where the labels of the run's data are other classes than those of the checkpoint."""
    if (difference := classes_differ(now.get("classes"), state.get("classes"))) is not None:
        raise UserError(
            f"{where}: the classes of data.shards are not those of this checkpoint: {difference}; encode the videos "
            "with --classes-of the set that it was trained on, or use another run_dir"
        )


def check_fits(folder: Path, state: dict[str, Any], recipe: Recipe, plan: list[Stage]) -> None:
    """Raises UserError where a checkpoint is of another model or stage than the recipe has."""
    step = state["step"]
    stage = stage_of(plan, step - 1)
    if state.get("stage", 0) != stage.index:
        raise UserError(
            f"{folder}: written in stage {state.get('stage', 0) + 1} of a curriculum, by the recipe step {step} is of "
            f"stage {stage.index + 1}; the stages up to a checkpoint cannot change within a run"
        )
    config, now = {**asdict(FARConfig(1, 1)), **state["model"]}, asdict(stage.config)
    if config != now:
        changed = [key for key in now if config.get(key) != now[key]]
        raise UserError(
            f"{folder}: this is another model's checkpoint (model.{changed[0]} was {config.get(changed[0])}, "
            f"the recipe has {now[changed[0]]}); use the recipe it was trained with, or another run_dir"
        )
