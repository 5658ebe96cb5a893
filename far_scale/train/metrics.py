"""Logging of a run: console lines, log.jsonl, and wandb and TensorBoard if the recipe enables them."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from far_scale.config.schema import LogSection, TrainSection
from far_scale.distributed.process_group import Processes
from far_scale.health.straggler import StragglerDetector
from far_scale.train.curriculum import Stage
from far_scale.train.tensorboard_log import TensorBoardLog
from far_scale.train.wandb_run import WandbRun
from far_scale.utils.event_log import lines_up_to
from far_scale.utils.io import JsonlWriter, atomic_write


class Monitor:
    """Measures the steps and reports every `log.every` steps, on the main process; other processes only measure.

    Args:
        run: the run directory.
        log, train: the recipe's sections.
        stage_count: stages of the curriculum; 0 without one.
        processes: the run's.
        peak_flops: of one process's device, in FLOP/s.
        start: steps done before; lines of later steps in log.jsonl (from a run that died past its last checkpoint)
            are dropped, so that no step is in it twice.
        open_wandb: opens the wandb run; called on the main process, unless log.wandb.mode is disabled.
        stragglers: reports slow ranks at every line; None without a process group.

    Attributes:
        validated_steps: steps with a validation in the log at the start; only on the main process.
    """

    def __init__(
        self,
        run: Path,
        log: LogSection,
        train: TrainSection,
        stage_count: int,
        processes: Processes,
        peak_flops: float,
        start: int,
        open_wandb: Callable[[], WandbRun],
        stragglers: StragglerDetector | None = None,
    ) -> None:
        self._log, self._train, self._stage_count, self._processes = log, train, stage_count, processes
        self._peak_flops, self._stragglers = peak_flops, stragglers
        path = run / "log.jsonl"
        self._file = JsonlWriter(path)
        self._bar: tqdm[Any] | None = None
        self._wandb: WandbRun | None = None
        self._tensorboard: TensorBoardLog | None = None
        self._stage: Stage | None = None
        self._graphs, self._excluded_graphs, self._start = 0, 0, start
        self.validated_steps: set[int] = set()
        if processes.is_main_process:
            lines = lines_up_to(path, start)
            self.validated_steps = {line["step"] for line in lines if "validation" in line}
            if path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self._bar = tqdm(total=train.steps, initial=start, desc="train", unit="step", disable=None)
            if log.wandb.mode != "disabled":
                self._wandb = open_wandb()
                for line in lines:  # those missing in wandb after a kill
                    self._wandb.log(line)
            if log.tensorboard:
                self._tensorboard = TensorBoardLog(run, start, lines)
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._interval_start, self._data_wait, self._save_wait = time.perf_counter(), 0.0, 0.0
        self._steps, self._clips, self._tokens, self._flops = 0, 0.0, 0.0, 0.0
        self._losses: list[torch.Tensor] = []

    def begin_stage(self, stage: Stage) -> None:
        """Begin `stage`; prints it if the recipe has a curriculum."""
        if self._stage_count:
            self._stage = stage
            number = f"{stage.index + 1}/{self._stage_count}"
            self.print(f"stage {number} ({stage.name}): steps {stage.first + 1} to {stage.end}")

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measures the wait for a batch."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting_for_save(self) -> Iterator[None]:
        """Measures how long training waits for a save."""
        start = time.perf_counter()
        yield
        self._save_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude work that is not training: its time and the graphs that it compiles are not counted."""
        start, graphs = time.perf_counter(), compiled_graphs()
        yield
        self._interval_start += time.perf_counter() - start
        self._excluded_graphs += compiled_graphs() - graphs

    def count(self, clips: float, tokens: float, flops: float) -> None:
        """Count a pack that this process trained on, or its share of a pack that several processes trained on."""
        self._clips += clips
        self._tokens += tokens
        self._flops += flops

    def end_step(
        self, step: int, loss: torch.Tensor, learning_rate: float, grad_norm: torch.Tensor, skipped: int, damaged: int
    ) -> None:
        """End step `step` (from 1), and log a line if one is due.

        Args:
            loss: this process's mean over its packs, a scalar tensor; averaged over the processes for a line.
            grad_norm: global norm before clipping, a scalar tensor.
            skipped: steps that the guard has skipped so far.
            damaged: damaged clips that the stage has skipped up to the previous step.
        """
        self._steps += 1
        self._losses.append(loss)
        if self._bar is not None:
            self._bar.update()
        if self._train.compile and (graphs := compiled_graphs() - self._excluded_graphs) != self._graphs:
            self._graphs = graphs
            self.print(f"step {step}: {graphs} graphs compiled so far")
        last = step == self._train.steps
        if step % self._log.every and step != 1 and not last:
            return
        losses = torch.stack(self._losses)
        # The mean over steps with finite loss, so that a skipped step leaves no gap in the curve.
        global_losses = self._processes.mean(losses)
        last_loss, loss_mean = global_losses[-1].item(), global_losses[global_losses.isfinite()].mean().item()
        seconds = time.perf_counter() - self._interval_start
        ranks = self._processes.world_size
        line: dict[str, Any] = {
            "step": step,
            **({} if self._stage is None else {"stage": self._stage.index + 1, "stage_name": self._stage.name}),
            "loss": last_loss,
            "loss_mean": loss_mean,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm.item(),
            "skipped": skipped,
            "damaged": damaged,
            "clips_per_second": ranks * self._clips / seconds,
            "tokens_per_second": ranks * self._tokens / seconds,
            "mfu": self._flops / seconds / self._peak_flops,
            "data_wait": self._data_wait / seconds,
            "save_wait": self._save_wait / seconds,
            "memory_gb": peak_memory(self._processes.device) / 1e9,
            "seconds_per_step": seconds / self._steps,
            **({"compiled_graphs": self._graphs} if self._train.compile else {}),
        }
        if self._processes.is_main_process:
            self._report({key: _none_unless_finite(value) for key, value in line.items()})
        if self._stragglers is not None:
            self._stragglers.report(step, self._data_wait / self._steps)
        self._begin_interval()

    def validated(self, step: int, values: dict[str, Any]) -> None:
        """Report a validation after `step`, in a separate line.

        Args:
            step: steps done.
            values: `seconds`, and those that were due of `weights` and `ema` (see `validation.summary`) and `samples`
                (see `ValidationVideos.write`).
        """
        if not self._processes.is_main_process:
            return
        line = {"step": step, "validation": values}
        self._file.append(line)
        if self._wandb is not None:
            self._wandb.log(line, is_resumed=step == self._start)
        if self._tensorboard is not None:
            self._tensorboard.log(line)
        figures = [
            f"{name} {values[key]['loss']:.4f}" for key, name in (("weights", "loss"), ("ema", "EMA")) if key in values
        ]
        scores = (values.get("samples") or {}).get("prediction", {})
        for key, name, digits in (("psnr", "PSNR", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4)):
            figures += [f"{name} {scores[key]:.{digits}f}"] if scores.get(key) is not None else []
        self.print(f"validation after step {step}  {'  '.join(figures)}  {values['seconds']:.1f} s")

    def print(self, text: str) -> None:
        """Print a line on the console; on the main process only."""
        if self._processes.is_main_process:
            tqdm.write(text)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the bar, wandb and TensorBoard."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.finish()

    def _report(self, line: dict[str, Any]) -> None:
        self._file.append(line)
        if self._wandb is not None:
            self._wandb.log(line)
        if self._tensorboard is not None:
            self._tensorboard.log(line)
        stage = "" if self._stage is None else f"{self._stage.name}  "
        loss, norm = ("not finite" if line[key] is None else f"{line[key]:.4f}" for key in ("loss_mean", "grad_norm"))
        skipped = f"  {line['skipped']} steps skipped" if line["skipped"] else ""
        skipped += f"  {line['damaged']} damaged clips left out" if line["damaged"] else ""
        self.print(
            f"step {line['step']}/{self._train.steps}  {stage}loss {loss}  "
            f"lr {line['learning_rate']:.2e}  grad norm {norm}  "
            f"{line['clips_per_second']:.1f} clips/s  {line['tokens_per_second']:.0f} tokens/s  "
            f"MFU {line['mfu']:.1%}  data wait {line['data_wait']:.1%}  {line['memory_gb']:.2f} GB{skipped}"
        )


def _none_unless_finite(value: Any) -> Any:
    """None for a number that is not finite, which JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in bytes: on its GPU, or main memory without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compiled_graphs() -> int:
    """Graphs compiled in this process so far. It must stop growing after the first packs."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
