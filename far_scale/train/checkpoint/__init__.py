"""Checkpoints: written in the background, checksummed, synced, renamed; `latest` changes last.

    checkpoints/step-00001000/   state.json, torch.distributed.checkpoint's files, checksums.json
    checkpoints/latest           the name of the newest whole one

Weights, Adam's moments and the EMA are stored as flat float32 tensors by parameter name, in the pieces that the ranks
held; a reader can ask for any other pieces. So neither the rank count nor the ZeRO stage is part of the format, and one
process can read any of it.
"""

from far_scale.train.checkpoint.folders import damage, fingerprint, point_at, quarantine, read_state
from far_scale.train.checkpoint.metadata import read_metadata
from far_scale.train.checkpoint.pieces import FlatPiece, HostCopy, load
from far_scale.train.checkpoint.write import save
from far_scale.train.run_dir import latest_step, step_folder, steps_to_try

__all__ = [
    "FlatPiece",
    "HostCopy",
    "damage",
    "fingerprint",
    "latest_step",
    "load",
    "point_at",
    "quarantine",
    "read_metadata",
    "read_state",
    "save",
    "step_folder",
    "steps_to_try",
]
