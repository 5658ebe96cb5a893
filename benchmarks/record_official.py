"""Records what the official FAR code computes, for tests/convert/test_official.py to compare with; no benchmark.

    python benchmarks/record_official.py --official PATH_TO_A_CLONE

Runs the official models on the cases of tests/harness/official_cases.py and writes
tests/recorded/official/NAME.safetensors: the velocities of the window frames `[B, Fw, C, H, W]` in float64, one tensor
a frame count, and as metadata the names and shapes of the official state dict, its commit and the versions. The models
are in training mode, so that they give all frames, their condition dropout is off, and what they would compute in
float32 is computed in float64 (`InFloat64`).
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from measure import commit
from official import OfficialCode
from safetensors.torch import save_file
from torch import Tensor, nn

from far_scale.train.flow_matching import CLEAN
from far_scale.utils.command_line import command_line

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harness.official_cases import CASES, CLIPS, RECORDED, Case, InFloat64, inputs, official_weights


@torch.no_grad()
def velocity(model: nn.Module, case: Case, frames: int) -> Tensor:
    """What the official `model`, in float64, gives for the window frames of a case's clips of `frames` frames."""
    given = inputs(case, frames)
    conditions = None
    if case.config.labels:
        conditions = {"label": given["labels"]}
    elif case.config.actions or case.config.context_patch:
        # The official FAR-Long cuts actions even where it has none to embed.
        conditions = {"action": given.get("actions", torch.zeros(CLIPS, frames, dtype=torch.int64))}
    timesteps = given["timesteps"].clamp(min=CLEAN)  # it doubles the -1 of context frames by itself
    with InFloat64():
        found = model(given["latents"].double(), timestep=timesteps.double(), conditions=conditions).sample
    assert found.dtype == torch.float64
    return found[:, -min(frames, case.config.window) :].contiguous()


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Record the official code's velocities for tests/convert/test_official.py."
    )
    parser.add_argument("--official", type=Path, required=True, help="clone of github.com/showlab/FAR")
    parser.add_argument("--out", type=Path, default=RECORDED, help="folder to write to (default: %(default)s)")
    asked = parser.parse_args()
    code = OfficialCode(asked.official)
    made_with = {name: version(name) for name in ("torch", "diffusers")}
    made_with["official commit"] = commit(asked.official, "far")
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        model = code.model(case.config).train()
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict(official_weights(shapes))
        model.double()
        velocities = {f"velocity_{frames}": velocity(model, case, frames) for frames in case.frames}
        save_file(velocities, asked.out / f"{name}.safetensors", {"shapes": json.dumps(shapes), **made_with})
        print(f"{name}: std {float(next(iter(velocities.values())).std()):.2f}")


if __name__ == "__main__":
    main()
