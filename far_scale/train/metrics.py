"""What a run says while it runs: a console line, a line in log.jsonl, and wandb where the recipe asks for it."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from far_scale.config.recipe import Recipe
from far_scale.distributed.process_group import Processes
from far_scale.health.straggler import StragglerDetector
from far_scale.train.compiled import compiled_graphs
from far_scale.train.curriculum import Stage
from far_scale.train.wandb_run import WandbRun
from far_scale.utils.event_log import lines_up_to
from far_scale.utils.io import JsonlWriter, atomic_write


class Monitor:
    """Counts what the steps do and tells it every `log.every` steps, on the main process; the others only count.

    Args:
        recipe: the run's.
        processes: who runs it.
        peak_flops: what one process's device can do, in FLOP/s.
        start: steps done before; lines of later steps in log.jsonl (from a run that died past its last checkpoint)
            are dropped, so that no step stands there twice.
        identity: of the run, see `WandbRun`.
        slow: names slow ranks at every line; None where there is but one process without a group.

    Attributes:
        validated_steps: those that the log had a validation of at the start; on the main process alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        processes: Processes,
        peak_flops: float,
        start: int,
        identity: str,
        slow: StragglerDetector | None = None,
    ) -> None:
        self._recipe, self._processes, self._peak, self._slow = recipe, processes, peak_flops, slow
        log = Path(recipe.run_dir) / "log.jsonl"
        self._file = JsonlWriter(log)
        self._bar: tqdm[Any] | None = None
        self._wandb: WandbRun | None = None
        self._stage: Stage | None = None
        self._graphs, self._graphs_apart, self._start = 0, 0, start
        self.validated_steps: set[int] = set()
        if processes.is_main_process:
            lines = lines_up_to(log, start)
            self.validated_steps = {line["step"] for line in lines if "validation" in line}
            if log.exists():
                with atomic_write(log) as beside:
                    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self._bar = tqdm(total=recipe.train.steps, initial=start, desc="train", unit="step", disable=None)
            if recipe.log.wandb.mode != "disabled":
                self._wandb = WandbRun(recipe, identity, Path(recipe.run_dir))
                for line in lines:  # what a kill has kept from it
                    self._wandb.log(line)
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._since, self._waited, self._saved = time.perf_counter(), 0.0, 0.0
        self._steps, self._clips, self._tokens, self._flops = 0, 0, 0, 0
        self._losses: list[torch.Tensor] = []

    def begin_stage(self, stage: Stage) -> None:
        """The next steps are of `stage`; told where the recipe has a curriculum."""
        if self._recipe.curriculum:
            self._stage = stage
            number = f"{stage.index + 1}/{len(self._recipe.curriculum)}"
            self.say(f"stage {number} ({stage.name}): steps {stage.first + 1} to {stage.end}")

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the wait for a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting_for_save(self) -> Iterator[None]:
        """Around what training waits for when it saves."""
        start = time.perf_counter()
        yield
        self._saved += time.perf_counter() - start

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no part of training: neither its time nor what it compiles (attention, on a GPU) counts."""
        start, graphs = time.perf_counter(), compiled_graphs()
        yield
        self._since += time.perf_counter() - start
        self._graphs_apart += compiled_graphs() - graphs

    def count(self, clips: int, tokens: int, flops: int) -> None:
        """A pack was trained on, on this process."""
        self._clips += clips
        self._tokens += tokens
        self._flops += flops

    def end_step(
        self, step: int, loss: torch.Tensor, learning_rate: float, grad_norm: torch.Tensor, skipped: int, damaged: int
    ) -> None:
        """Step number `step` (from 1) is done.

        Args:
            loss: this process's mean over its packs, a scalar tensor; it is averaged over the processes when told.
            grad_norm: global norm before clipping, a scalar tensor.
            skipped: steps that the guard has skipped so far, as far as is known.
            damaged: clips of damaged samples that the stage has left out up to the step before.
        """
        self._steps += 1
        self._losses.append(loss)
        if self._bar is not None:
            self._bar.update()
        if self._recipe.train.compile and (graphs := compiled_graphs() - self._graphs_apart) != self._graphs:
            self._graphs = graphs
            self.say(f"step {step}: {graphs} graphs compiled so far")
        last = step == self._recipe.train.steps
        if step % self._recipe.log.every and step != 1 and not last:
            return
        losses = torch.stack(self._losses)
        # The mean is of the steps whose loss is finite, so that one that was skipped leaves no gap in the curve.
        global_losses = self._processes.mean(losses)
        loss_now, loss_mean = global_losses[-1].item(), global_losses[global_losses.isfinite()].mean().item()
        seconds = time.perf_counter() - self._since
        ranks = self._processes.world_size
        line: dict[str, Any] = {
            "step": step,
            **({} if self._stage is None else {"stage": self._stage.index + 1, "stage_name": self._stage.name}),
            "loss": loss_now,
            "loss_mean": loss_mean,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm.item(),
            "skipped": skipped,
            "damaged": damaged,
            "clips_per_second": ranks * self._clips / seconds,
            "tokens_per_second": ranks * self._tokens / seconds,
            "mfu": self._flops / seconds / self._peak,
            "data_wait": self._waited / seconds,
            "save_wait": self._saved / seconds,
            "memory_gb": _peak_memory(self._processes.device) / 1e9,
            "seconds_per_step": seconds / self._steps,
            **({"compiled_graphs": self._graphs} if self._recipe.train.compile else {}),
        }
        if self._processes.is_main_process:
            self._tell({key: _or_none(value) for key, value in line.items()})
        if self._slow is not None:
            self._slow.report(step, self._waited / self._steps)
        self._begin_interval()

    def validated(self, step: int, values: dict[str, Any]) -> None:
        """A validation after `step`, which gets a line of its own.

        Args:
            step: steps done.
            values: `weights` and `ema` (see `validation.summary`), `samples` (see `Samples.write`), as far as they were
                due, and `seconds`.
        """
        if not self._processes.is_main_process:
            return
        line = {"step": step, "validation": values}
        self._file.append(line)
        if self._wandb is not None:
            self._wandb.log(line, late=step == self._start)
        figures = [
            f"{name} {values[key]['loss']:.4f}" for key, name in (("weights", "loss"), ("ema", "EMA")) if key in values
        ]
        scores = (values.get("samples") or {}).get("prediction", {})
        for key, name, places in (("psnr", "PSNR", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4)):
            figures += [f"{name} {scores[key]:.{places}f}"] if scores.get(key) is not None else []
        self.say(f"validation after step {step}  {'  '.join(figures)}  {values['seconds']:.1f} s")

    def say(self, text: str) -> None:
        """A line on the console, from the main process alone."""
        if self._processes.is_main_process:
            tqdm.write(text)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the bar and wandb."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _tell(self, line: dict[str, Any]) -> None:
        self._file.append(line)
        if self._wandb is not None:
            self._wandb.log(line)
        stage = "" if self._stage is None else f"{self._stage.name}  "
        loss, norm = ("not finite" if line[key] is None else f"{line[key]:.4f}" for key in ("loss_mean", "grad_norm"))
        skipped = f"  {line['skipped']} steps skipped" if line["skipped"] else ""
        skipped += f"  {line['damaged']} damaged clips left out" if line["damaged"] else ""
        self.say(
            f"step {line['step']}/{self._recipe.train.steps}  {stage}loss {loss}  "
            f"lr {line['learning_rate']:.2e}  grad norm {norm}  "
            f"{line['clips_per_second']:.1f} clips/s  {line['tokens_per_second']:.0f} tokens/s  "
            f"MFU {line['mfu']:.1%}  data wait {line['data_wait']:.1%}  {line['memory_gb']:.2f} GB{skipped}"
        )


def _or_none(value: Any) -> Any:
    """JSON has no word for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _peak_memory(device: torch.device) -> float:
    """The most bytes this process has held so far: on the GPU where it has one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
