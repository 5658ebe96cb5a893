"""Which member of a sample holds what: as the user says, or as one of the first samples of the first shard shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from far_scale.data.shards.adopted import AXES, Adoption, Layout, Part, PartKind
from far_scale.data.shards.adopted_mds import kind_of
from far_scale.data.shards.adopted_samples import encodings_of, read_as, reader_of, samples_of
from far_scale.data.shards.adopted_values import Members, read_json
from far_scale.data.shards.errors import Mismatch
from far_scale.data.shards.manifest import LatentDtype
from far_scale.data.shards.sample import Read
from far_scale.data.shards.tensor_formats import find_tensor, safetensors_entries, torch_keys
from far_scale.utils.errors import UserError

_KINDS: dict[str, PartKind] = {
    "npy": "npy",
    "safetensors": "safetensors",
    "pth": "torch",
    "pt": "torch",
    "json": "json",
}
# Where parts stand if the user does not say: the first of these that is there.
_LATENTS = ("latent", "latents")
_ACTIONS = ("json:actions", "json:action", "actions.npy", "action.npy", "actions", "action")
_LABEL = ("cls", "json:label", "json:class", "label", "class")
_FPS = ("json:fps", "fps")
_NAMES = ("__key__", "key", "id")
_TRIED = 10  # samples, of which the first may be broken


@dataclass(frozen=True)
class Wishes:
    """What the user says of the samples; a part is `MEMBER` or `MEMBER:KEY`, None where it is to be found.

    Attributes:
        layout: as in Adoption; None for FCHW where the latents' shape allows no other.
        scale_factor: as in Adoption.
        latents, actions_in, label_in: the parts.
        fps: the part, or a number for all samples.
        name_in: the column of MDS files that names samples.
        actions, labels: numbers of classes, 0 for none.
    """

    layout: Layout | None = None
    scale_factor: float = 1.0
    latents: str | None = None
    actions_in: str | None = None
    label_in: str | None = None
    fps: str | float | None = None
    name_in: str | None = None
    actions: int = 0
    labels: int = 0


class Chosen(NamedTuple):
    """How the samples of a set are read."""

    adoption: Adoption
    latent_shape: tuple[int, int, int]
    latent_dtype: LatentDtype


def choose(path: Path, name: str, file: str, channels: int, wishes: Wishes) -> Chosen:
    """Look at the first sample of a shard, or if it has no such parts at one of those after it.

    Args:
        path: of the shard.
        name: as messages call it.
        file: what its manifest will call it; its format follows from it.
        channels: of the autoencoder's latents.

    Raises:
        UserError: a part that is not there, several that might be meant, or latents of another shape.
    """
    problems = []
    for sample, members in itertools.islice(samples_of(path, name, file, None), _TRIED):
        try:
            return _choose(path, file, members, channels, wishes)
        except Mismatch as problem:
            problems.append(f"{name}: the first sample, {sample!r}: {problem}")
    raise UserError(problems[0])


def _choose(path: Path, file: str, members: Members, channels: int, wishes: Wishes) -> Chosen:
    with open(path, "rb") as opened:
        read, is_mds = reader_of(opened.fileno()), file.endswith(".mds")
        if is_mds:
            starts = {each: bytes(read(m.offset, min(m.size, 16))) for each, m in members.items()}
            kinds = {each: kind_of(code, starts[each]) for each, code in encodings_of(read, path).items()}
        else:
            kinds = {each: _KINDS.get(each.rpartition(".")[2], "text") for each in members}
        return _First(read, members, kinds, is_mds).choose(channels, wishes)


@dataclass(frozen=True)
class _First:
    """The first sample: its members, or its columns of an MDS file, and what each is (None: nothing that is read)."""

    read: Read
    members: Members
    kinds: Mapping[str, PartKind | None]
    is_mds: bool

    def choose(self, channels: int, wishes: Wishes) -> Chosen:
        latents = self._latents(wishes)
        member = self.members[latents.member]
        try:
            found = find_tensor(latents, self.read, member.offset, member.size)
        except Mismatch as problem:
            raise Mismatch(f"its {latents} {problem}") from None
        layout = _layout(latents, found.shape, channels, wishes.layout)
        adoption = Adoption(
            layout=layout,
            scale_factor=wishes.scale_factor,
            latents=latents,
            actions=self._one_of(wishes.actions_in, _near(latents), "--actions-in") if wishes.actions else None,
            label=self._one_of(wishes.label_in, _LABEL, "--label-in") if wishes.labels else None,
            fps=wishes.fps if isinstance(wishes.fps, float) else self._one_of(wishes.fps, _FPS, "--fps"),
            name=self._name(wishes.name_in),
        )
        dtype = read_as(found.dtype, wishes.scale_factor)
        if dtype is None:
            raise Mismatch(f"its {latents} is {found.dtype}, and latents are float16, bfloat16, float32 or float64")
        _, height, width = (found.shape[axis] for axis in AXES[layout][1:])
        return Chosen(adoption, (channels, height, width), dtype)

    def _latents(self, wishes: Wishes) -> Part:
        """The part that is the latents, with its key where the member has several tensors."""
        tensors = [each for each in self.members if self._holds_tensors(each)]
        if wishes.latents is not None:
            member, _, key = wishes.latents.partition(":")
        else:
            others = {(part or "").partition(":")[0] for part in (wishes.actions_in, *_ACTIONS)}
            named = [each for each in tensors if each in _LATENTS]
            plain = named or [each for each in tensors if each not in others] or tensors
            if len(plain) != 1:
                has = ", ".join(sorted(plain)) or f"none that is an array or tensor, but {_listed(self.members)}"
                raise Mismatch(f"the latents are one of its members, and it has {has}; name it by --latents")
            member, key = plain[0], ""
        if member not in tensors:
            raise Mismatch(f"its latents are no {member}: it has {_listed(tensors)} of arrays or tensors")
        part = Part(member=member, kind=self._kind(member), key=key or None)
        names = self._tensor_names(part)
        if part.key is None and names is not None:
            likely = [each for each in names if len(names) == 1 or each in _LATENTS]
            if len(likely) != 1:
                raise Mismatch(f"its {member} has the tensors {_listed(names)}; name one by --latents {member}:NAME")
            part = part.model_copy(update={"key": likely[0]})
        return part

    def _tensor_names(self, part: Part) -> list[str] | None:
        """The names of the tensors in a member that may have several."""
        member = self.members[part.member]
        try:
            if part.kind == "safetensors":
                return list(safetensors_entries(self.read, member.offset, member.size))
            return torch_keys(self.read, member.offset, member.size) if part.kind == "torch" else None
        except Mismatch as problem:
            raise Mismatch(f"its {part.member} {problem}") from None

    def _one_of(self, wish: str | None, usual: Iterable[str], option: str) -> Part:
        """The part that the user wishes, or the first of the usual ones that is there."""
        for text in usual if wish is None else (wish,):
            member, _, key = text.partition(":")
            if member in self.members and self.kinds[member] is not None:
                part = Part(member=member, kind=self._kind(member), key=key or None)
                if wish is not None or part.key is None or part.key in self._names(part):
                    return part
        where = wish or " or ".join(usual)
        raise Mismatch(f"it has no {where}, but the members {_listed(self.members)}; say where by {option}")

    def _name(self, wish: str | None) -> Part | None:
        """The column that names samples, where there is one."""
        if not self.is_mds:
            return None
        texts = [each for each in _NAMES if self.kinds.get(each) == "text"]
        part = self._one_of(wish, texts, "--name-in") if wish is not None or texts else None
        if part is not None and (part.kind != "text" or part.key is not None):
            raise Mismatch(f"its {part} is {part.kind}, and names are texts; name another column by --name-in, or none")
        return part

    def _names(self, part: Part) -> list[str]:
        member = self.members[part.member]
        if part.kind == "json":
            found = read_json(self.read, member.offset, member.size, part)
            return list(found) if isinstance(found, dict) else []
        return self._tensor_names(part) or []

    def _holds_tensors(self, member: str) -> bool:
        kind = self.kinds[member] or ""
        return kind in ("npy", "safetensors", "torch") or kind.startswith("ndarray")

    def _kind(self, member: str) -> PartKind:
        kind = self.kinds[member]
        assert kind is not None
        return kind


def _layout(latents: Part, shape: tuple[int, ...], channels: int, wish: Layout | None) -> Layout:
    """The layout that is wished, or FCHW, if that gives latents of so many channels and is not one of several."""
    if len(shape) != 4:
        raise Mismatch(f"its {latents} is {list(shape)}, and latents have the axes F, C, H and W")
    fitting = [layout for layout in get_args(Layout) if shape[AXES[layout][1]] == channels]
    layout: Layout = wish or "FCHW"
    if layout not in fitting:
        fix = f"--layout {' or '.join(fitting)} fits" if fitting else "name the autoencoder that made them"
        raise Mismatch(
            f"its {latents} is {list(shape)}, as {layout} of {shape[AXES[layout][1]]} channels, and the autoencoder's "
            f"latents have {channels}; {fix}"
        )
    if wish is None and len(fitting) > 1:
        raise Mismatch(f"its {latents} is {list(shape)}, which may be {' or '.join(fitting)}; say which by --layout")
    return layout


def _near(latents: Part) -> tuple[str, ...]:
    """Where actions may stand: in places of their own, or beside the latents."""
    return _ACTIONS if latents.key is None else (*_ACTIONS, f"{latents.member}:action", f"{latents.member}:actions")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))[:100]
