"""What a run says while it runs: a console line, a line in log.jsonl, and wandb where the recipe asks for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from far_scale.errors import UserError
from far_scale.files import atomic_write
from far_scale.recipe import Recipe
from far_scale.train.compiled import compiled_graphs
from far_scale.train.curriculum import Stage
from far_scale.train.processes import Processes


class Monitor:
    """Counts what the steps do and tells it every `log.every` steps, on the main process; the others only count.

    Args:
        recipe: the run's.
        processes: who runs it.
        peak_flops: what one process's device can do, in FLOP/s.
        start: steps done before; lines of later steps in log.jsonl (from a run that died past its last checkpoint)
            are dropped, so that no step stands there twice.
    """

    def __init__(self, recipe: Recipe, processes: Processes, peak_flops: float, start: int) -> None:
        self._recipe, self._processes, self._peak = recipe, processes, peak_flops
        self._log = Path(recipe.run_dir) / "log.jsonl"
        self._bar: tqdm[Any] | None = None
        self._wandb: Any = None
        self._stage: Stage | None = None
        self._graphs = 0
        if processes.main:
            _drop_later_lines(self._log, start)
            self._bar = tqdm(total=recipe.train.steps, initial=start, desc="train", unit="step", disable=None)
            self._wandb = _start_wandb(recipe)
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._since, self._waited = time.perf_counter(), 0.0
        self._steps, self._clips, self._tokens, self._flops = 0, 0, 0, 0
        self._losses: list[torch.Tensor] = []

    def begin_stage(self, stage: Stage) -> None:
        """The next steps are of `stage`; told where the recipe has a curriculum."""
        if self._recipe.curriculum:
            self._stage = stage
            number = f"{stage.index + 1}/{len(self._recipe.curriculum)}"
            self.say(f"stage {number} ({stage.name}): steps {stage.first + 1} to {stage.end}")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self, clips: int, tokens: int, flops: int) -> None:
        """A pack was trained on, on this process."""
        self._clips += clips
        self._tokens += tokens
        self._flops += flops

    def end_step(self, step: int, loss: torch.Tensor, learning_rate: float, grad_norm: Any) -> None:
        """Step number `step` (from 1) is done.

        Args:
            loss: this process's mean over its packs, a scalar tensor; it is averaged over the processes when told.
            grad_norm: global norm before clipping.
        """
        self._steps += 1
        self._losses.append(loss)
        if self._bar is not None:
            self._bar.update()
        if self._recipe.train.compile and (graphs := compiled_graphs()) != self._graphs:
            self._graphs = graphs
            self.say(f"step {step}: {graphs} graphs compiled so far")
        last = step == self._recipe.train.steps
        if step % self._recipe.log.every and step != 1 and not last:
            return
        losses = torch.stack(self._losses)
        loss_now, loss_mean = self._processes.mean(torch.stack([losses[-1], losses.double().mean()])).tolist()
        seconds = time.perf_counter() - self._since
        ranks = self._processes.count
        line: dict[str, Any] = {
            "step": step,
            **({} if self._stage is None else {"stage": self._stage.index + 1, "stage_name": self._stage.name}),
            "loss": loss_now,
            "loss_mean": loss_mean,
            "learning_rate": learning_rate,
            "grad_norm": float(grad_norm),
            "clips_per_second": ranks * self._clips / seconds,
            "tokens_per_second": ranks * self._tokens / seconds,
            "mfu": self._flops / seconds / self._peak,
            "data_wait": self._waited / seconds,
            "memory_gb": _peak_memory(self._processes.device) / 1e9,
            "seconds_per_step": seconds / self._steps,
            **({"compiled_graphs": self._graphs} if self._recipe.train.compile else {}),
        }
        if self._processes.main:
            self._tell(line)
        self._begin_interval()

    def say(self, text: str) -> None:
        """A line on the console, from the main process alone."""
        if self._processes.main:
            tqdm.write(text)

    def close(self) -> None:
        """Finish the bar and wandb."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _tell(self, line: dict[str, Any]) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            values = {f"train/{key}": value for key, value in line.items() if key != "step"}
            self._wandb.log(values, step=line["step"])
        stage = "" if self._stage is None else f"{self._stage.name}  "
        self.say(
            f"step {line['step']}/{self._recipe.train.steps}  {stage}loss {line['loss_mean']:.4f}  "
            f"lr {line['learning_rate']:.2e}  grad norm {line['grad_norm']:.3f}  "
            f"{line['clips_per_second']:.1f} clips/s  {line['tokens_per_second']:.0f} tokens/s  "
            f"MFU {line['mfu']:.1%}  data wait {line['data_wait']:.1%}  {line['memory_gb']:.2f} GB"
        )


def _drop_later_lines(log: Path, step: int) -> None:
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        with atomic_write(log) as beside:
            beside.write_text("".join(line + "\n" for line in lines))


def _start_wandb(recipe: Recipe) -> Any:
    settings = recipe.log.wandb
    if settings.mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("log.wandb.mode: wandb is not installed; pip install 'far_scale[wandb]'") from None
    # The same run directory is the same wandb run, however often it is resumed.
    identity = hashlib.sha256(str(Path(recipe.run_dir).resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=settings.project,
        name=settings.name or recipe.name,
        id=identity,
        resume="allow",
        mode=settings.mode,
        dir=recipe.run_dir,
        config=recipe.model_dump(mode="json"),
    )


def _peak_memory(device: torch.device) -> float:
    """The most bytes this process has held so far: on the GPU where it has one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
