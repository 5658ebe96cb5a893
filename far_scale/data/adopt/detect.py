"""Detects the format of samples: which member holds what, from the user's options and the first shard's samples."""

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

_KINDS_BY_SUFFIX: dict[str, PartKind] = {
    "npy": "npy",
    "safetensors": "safetensors",
    "pth": "torch",
    "pt": "torch",
    "json": "json",
}
# Where parts are looked for without an option: the first of these that exists.
_LATENTS = ("latent", "latents")
_ACTIONS = ("json:actions", "json:action", "actions.npy", "action.npy", "actions", "action")
_LABEL = ("cls", "json:label", "json:class", "label", "class")
_FPS = ("json:fps", "fps")
_NAMES = ("__key__", "key", "id")
_MAX_TRIED = 10  # samples that are looked at, since the first may be broken


@dataclass(frozen=True)
class FormatOptions:
    """The user's options for the format of samples; a part is `MEMBER` or `MEMBER:KEY`, None to detect it.

    Attributes:
        layout: as in Adoption; None for FCHW if the latents' shape allows no other.
        scale_factor: as in Adoption.
        latents, actions_in, label_in: the parts.
        fps: the part, or a number for all samples.
        name_in: the column of MDS files with the samples' names.
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


class SampleFormat(NamedTuple):
    """How the samples of a set are read; the latent shape is [C, H, W]."""

    adoption: Adoption
    latent_shape: tuple[int, int, int]
    latent_dtype: LatentDtype


def detect_format(path: Path, name: str, file: str, channels: int, options: FormatOptions) -> SampleFormat:
    """Detect the format from the first sample of a shard, or from one of the next if that has no such parts.

    Args:
        path: the shard.
        name: its name in messages.
        file: its name in the manifest; the suffix is the format.
        channels: latent channels of the autoencoder.

    Raises:
        UserError: a part that is missing or ambiguous, or latents of another shape.
    """
    problems = []
    for sample, members in itertools.islice(samples_of(path, name, file, None), _MAX_TRIED):
        try:
            return _detect_from_sample(path, file, members, channels, options)
        except Mismatch as problem:
            problems.append(f"{name}: the first sample, {sample!r}: {problem}")
    raise UserError(problems[0])


def _detect_from_sample(path: Path, file: str, members: Members, channels: int, options: FormatOptions) -> SampleFormat:
    with open(path, "rb") as opened:
        read, is_mds = reader_of(opened.fileno()), file.endswith(".mds")
        if is_mds:
            starts = {name: bytes(read(member.offset, min(member.size, 16))) for name, member in members.items()}
            kinds = {name: kind_of(code, starts[name]) for name, code in encodings_of(read, path).items()}
        else:
            kinds = {name: _KINDS_BY_SUFFIX.get(name.rpartition(".")[2], "text") for name in members}
        return _FormatDetector(read, members, kinds, is_mds).detect(channels, options)


@dataclass(frozen=True)
class _FormatDetector:
    """Detects the format from one sample.

    Attributes:
        members: members of a tar, or columns of an MDS file.
        kinds: kind of each member; None for kinds that are not read.
    """

    read: Read
    members: Members
    kinds: Mapping[str, PartKind | None]
    is_mds: bool

    def detect(self, channels: int, options: FormatOptions) -> SampleFormat:
        latents = self._find_latents(options)
        member = self.members[latents.member]
        try:
            tensor = find_tensor(latents, self.read, member.offset, member.size)
        except Mismatch as problem:
            raise Mismatch(f"its {latents} {problem}") from None
        layout = _detect_layout(latents, tensor.shape, channels, options.layout)
        adoption = Adoption(
            layout=layout,
            scale_factor=options.scale_factor,
            latents=latents,
            actions=self._find_part(options.actions_in, _action_parts(latents), "--actions-in")
            if options.actions
            else None,
            label=self._find_part(options.label_in, _LABEL, "--label-in") if options.labels else None,
            fps=options.fps if isinstance(options.fps, float) else self._find_part(options.fps, _FPS, "--fps"),
            name=self._find_name(options.name_in),
        )
        dtype = read_as(tensor.dtype, options.scale_factor)
        if dtype is None:
            raise Mismatch(f"its {latents} is {tensor.dtype}, and latents are float16, bfloat16, float32 or float64")
        _, height, width = (tensor.shape[axis] for axis in AXES[layout][1:])
        return SampleFormat(adoption, (channels, height, width), dtype)

    def _find_latents(self, options: FormatOptions) -> Part:
        """The part with the latents, with its key if the member has several tensors."""
        tensors = [name for name in self.members if self._holds_tensors(name)]
        if options.latents is not None:
            member, _, key = options.latents.partition(":")
        else:
            action_members = {(part or "").partition(":")[0] for part in (options.actions_in, *_ACTIONS)}
            usual = [name for name in tensors if name in _LATENTS]
            candidates = usual or [name for name in tensors if name not in action_members] or tensors
            if len(candidates) != 1:
                has = ", ".join(sorted(candidates)) or f"none that is an array or tensor, but {_join(self.members)}"
                raise Mismatch(f"the latents are one of its members, and it has {has}; name it by --latents")
            member, key = candidates[0], ""
        if member not in tensors:
            raise Mismatch(f"its latents are no {member}: it has {_join(tensors)} of arrays or tensors")
        part = Part(member=member, kind=self._kind(member), key=key or None)
        names = self._tensor_names(part)
        if part.key is None and names is not None:
            candidates = [name for name in names if len(names) == 1 or name in _LATENTS]
            if len(candidates) != 1:
                raise Mismatch(f"its {member} has the tensors {_join(names)}; name one by --latents {member}:NAME")
            part = part.model_copy(update={"key": candidates[0]})
        return part

    def _tensor_names(self, part: Part) -> list[str] | None:
        """Names of the tensors in a member of a kind that may have several."""
        member = self.members[part.member]
        try:
            if part.kind == "safetensors":
                return list(safetensors_entries(self.read, member.offset, member.size))
            return torch_keys(self.read, member.offset, member.size) if part.kind == "torch" else None
        except Mismatch as problem:
            raise Mismatch(f"its {part.member} {problem}") from None

    def _find_part(self, requested: str | None, usual: Iterable[str], option: str) -> Part:
        """The part that the user requested, or the first of the usual ones that exists."""
        for text in usual if requested is None else (requested,):
            member, _, key = text.partition(":")
            if member in self.members and self.kinds[member] is not None:
                part = Part(member=member, kind=self._kind(member), key=key or None)
                if requested is not None or part.key is None or part.key in self._names(part):
                    return part
        expected = requested or " or ".join(usual)
        raise Mismatch(f"it has no {expected}, but the members {_join(self.members)}; name one by {option}")

    def _find_name(self, requested: str | None) -> Part | None:
        """The column with the samples' names, if there is one."""
        if not self.is_mds:
            return None
        usual = [name for name in _NAMES if self.kinds.get(name) == "text"]
        part = self._find_part(requested, usual, "--name-in") if requested is not None or usual else None
        if part is not None and (part.kind != "text" or part.key is not None):
            raise Mismatch(f"its {part} is {part.kind}, and names are texts; name another column by --name-in, or none")
        return part

    def _names(self, part: Part) -> list[str]:
        member = self.members[part.member]
        if part.kind == "json":
            value = read_json(self.read, member.offset, member.size, part)
            return list(value) if isinstance(value, dict) else []
        return self._tensor_names(part) or []

    def _holds_tensors(self, member: str) -> bool:
        kind = self.kinds[member] or ""
        return kind in ("npy", "safetensors", "torch") or kind.startswith("ndarray")

    def _kind(self, member: str) -> PartKind:
        kind = self.kinds[member]
        assert kind is not None
        return kind


def _detect_layout(latents: Part, shape: tuple[int, ...], channels: int, requested: Layout | None) -> Layout:
    """The requested layout, or FCHW if it is the only one with this number of channels."""
    if len(shape) != 4:
        raise Mismatch(f"its {latents} is {list(shape)}, and latents have the axes F, C, H and W")
    candidates = [layout for layout in get_args(Layout) if shape[AXES[layout][1]] == channels]
    layout: Layout = requested or "FCHW"
    if layout not in candidates:
        fix = f"--layout {' or '.join(candidates)} fits" if candidates else "name the autoencoder that made them"
        raise Mismatch(
            f"its {latents} is {list(shape)}, as {layout} of {shape[AXES[layout][1]]} channels, and the autoencoder's "
            f"latents have {channels}; {fix}"
        )
    if requested is None and len(candidates) > 1:
        raise Mismatch(f"its {latents} is {list(shape)}, which may be {' or '.join(candidates)}; name one by --layout")
    return layout


def _action_parts(latents: Part) -> tuple[str, ...]:
    """Where actions are looked for: in members of their own, and beside the latents."""
    return _ACTIONS if latents.key is None else (*_ACTIONS, f"{latents.member}:action", f"{latents.member}:actions")


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))[:100]
