"""Which member of a sample holds what: as the user says, or as the first sample of the first shard shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from far_scale.data.shards.adopted import AXES, Adoption, Layout, Part, PartKind
from far_scale.data.shards.foreign_samples import (
    Members,
    json_of,
    members_by_sample,
    read_as,
    reader_of,
)
from far_scale.data.shards.foreign_tensors import Read, find_tensor, safetensors_entries, torch_keys
from far_scale.data.shards.manifest import LatentDtype
from far_scale.data.shards.sample import Mismatch
from far_scale.errors import UserError

_KINDS: dict[str, PartKind] = {
    "npy": "npy",
    "safetensors": "safetensors",
    "pth": "torch",
    "pt": "torch",
    "json": "json",
}
_TENSORS = ("npy", "safetensors", "torch")
# Where parts stand if the user does not say: the first of these that is there.
_LATENTS = ("latent", "latents")
_ACTIONS = ("json:actions", "json:action", "actions.npy", "action.npy")
_LABEL = ("cls", "json:label", "json:class")


@dataclass(frozen=True)
class Wishes:
    """What the user says of the samples; a part is `MEMBER` or `MEMBER:KEY`, None where it is to be found.

    Attributes:
        layout, scale_factor: as in Adoption.
        latents, actions_in, label_in: the parts.
        fps: the part, or a number for all samples.
        actions, labels: numbers of classes, 0 for none.
    """

    layout: Layout = "FCHW"
    scale_factor: float = 1.0
    latents: str | None = None
    actions_in: str | None = None
    label_in: str | None = None
    fps: str | float = "json:fps"
    actions: int = 0
    labels: int = 0


class Chosen(NamedTuple):
    """How the samples of a set are read."""

    adoption: Adoption
    latent_shape: tuple[int, int, int]
    latent_dtype: LatentDtype


def choose(path: Path, name: str, channels: int, wishes: Wishes) -> Chosen:
    """Look at the first sample of a shard.

    Args:
        path: of the shard.
        name: as messages call it.
        channels: of the autoencoder's latents.

    Raises:
        UserError: a part that is not there, several that might be meant, or latents of another shape.
    """
    sample, members = next(iter(members_by_sample(path, name).items()))
    try:
        with open(path, "rb") as file:
            return _choose(reader_of(file.fileno()), members, channels, wishes)
    except Mismatch as problem:
        raise UserError(f"{name}: the first sample, {sample!r}: {problem}") from None


def _choose(read: Read, members: Members, channels: int, wishes: Wishes) -> Chosen:
    latents = _latents(read, members, wishes)
    adoption = Adoption(
        layout=wishes.layout,
        scale_factor=wishes.scale_factor,
        latents=latents,
        actions=_one_of(read, members, wishes.actions_in, _actions_near(latents), "actions")
        if wishes.actions
        else None,
        label=_one_of(read, members, wishes.label_in, _LABEL, "label") if wishes.labels else None,
        fps=wishes.fps if isinstance(wishes.fps, float) else _one_of(read, members, None, (wishes.fps,), "fps"),
    )
    member = members[latents.member]
    try:
        found = find_tensor(latents, read, member.offset, member.size)
    except Mismatch as problem:
        raise Mismatch(f"its {latents} {problem}") from None
    if len(found.shape) != 4:
        raise Mismatch(
            f"its {latents} is {list(found.shape)}, and latents have the axes F, C, H and W; store each clip so"
        )
    _, c, height, width = (found.shape[axis] for axis in AXES[wishes.layout])
    if c != channels:
        fitting = [layout for layout in get_args(Layout) if found.shape[AXES[layout][1]] == channels]
        fix = f"--layout {' or '.join(fitting)} fits" if fitting else "name the autoencoder that made them"
        raise Mismatch(
            f"its {latents} is {list(found.shape)}, as {wishes.layout} of {c} channels, and the autoencoder's latents "
            f"have {channels}; {fix}"
        )
    dtype = read_as(found.dtype, wishes.scale_factor)
    if dtype is None:
        raise Mismatch(f"its {latents} is {found.dtype}, and latents are float16, bfloat16, float32 or float64")
    return Chosen(adoption, (c, height, width), dtype)


def _latents(read: Read, members: Members, wishes: Wishes) -> Part:
    """The part that is the latents, with its key where the member has several tensors."""
    if wishes.latents is not None:
        member, _, key = wishes.latents.partition(":")
    else:
        others = {(part or "").partition(":")[0] for part in (wishes.actions_in, *_ACTIONS)}
        tensors = [each for each in members if _kind(each) in _TENSORS]
        plain = [each for each in tensors if each not in others] or tensors
        if len(plain) != 1:
            has = ", ".join(sorted(plain)) or f"none that is .npy, .safetensors, .pth or .pt, but {_listed(members)}"
            raise Mismatch(f"the latents are one of its members, and it has {has}; name it by --latents")
        member, key = plain[0], ""
    if member not in members or _kind(member) not in _TENSORS:
        raise Mismatch(f"it has no member {member} that is .npy, .safetensors, .pth or .pt, but {_listed(members)}")
    part = Part(member=member, kind=_kind(member), key=key or None)
    names = _tensor_names(read, members, part)
    if part.key is None and names is not None:
        likely = [each for each in names if len(names) == 1 or each in _LATENTS]
        if len(likely) != 1:
            raise Mismatch(f"its {member} has the tensors {_listed(names)}; name one by --latents {member}:NAME")
        part = part.model_copy(update={"key": likely[0]})
    return part


def _tensor_names(read: Read, members: Members, part: Part) -> Sequence[str] | None:
    """The names of the tensors in a member that may have several."""
    member = members[part.member]
    try:
        if part.kind == "safetensors":
            return list(safetensors_entries(read, member.offset, member.size))
        return torch_keys(read, member.offset, member.size) if part.kind == "torch" else None
    except Mismatch as problem:
        raise Mismatch(f"its {part.member} {problem}") from None


def _actions_near(latents: Part) -> tuple[str, ...]:
    """Where actions may stand: in places of their own, or beside the latents."""
    return _ACTIONS if latents.key is None else (*_ACTIONS, f"{latents.member}:action", f"{latents.member}:actions")


def _one_of(read: Read, members: Members, wish: str | None, usual: Sequence[str], what: str) -> Part:
    """The part that the user wishes, or the first of the usual ones that is there."""
    for text in usual if wish is None else (wish,):
        member, _, key = text.partition(":")
        if member in members:
            part = Part(member=member, kind=_kind(member), key=key or None)
            if wish is not None or part.key is None or part.key in _names(read, members, part):
                return part
    option = {"actions": "--actions-in", "label": "--label-in", "fps": "--fps"}[what]
    where = wish or " or ".join(usual)
    raise Mismatch(f"it has no {what} in {where}, but the members {_listed(members)}; say where by {option}")


def _names(read: Read, members: Members, part: Part) -> Sequence[str]:
    if part.kind == "json":
        found = json_of(read, members[part.member].offset, members[part.member].size, part)
        return list(found) if isinstance(found, dict) else []
    return _tensor_names(read, members, part) or []


def _kind(member: str) -> PartKind:
    return _KINDS.get(member.rpartition(".")[2], "text")


def _listed(names: Sequence[str] | Members) -> str:
    return ", ".join(sorted(names))[:100]
