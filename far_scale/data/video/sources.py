"""What is to be encoded: the videos of a folder, of a UCF-101 split or of a list, always in one order.

In a folder, an .npz file beside a video of the same name holds that video's actions, as in TECO's Minecraft, and its
label. The folders that contain videos are the classes, see `SourceSet`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from far_scale.data.video.find import VIDEO_SUFFIXES, find_videos
from far_scale.data.video.video_lists import (
    CLASSES_NAME,
    LIST_SUFFIXES,
    ListEntry,
    is_class_number,
    is_valid_path,
    read_class_index,
    read_list,
    read_split,
)
from far_scale.data.video.videos import read_label
from far_scale.utils.errors import UserError, print_warning

_MAX_KEY = 80  # characters
_FLIPPED = "-flip"  # at the end of a mirrored sample's key


@dataclass(frozen=True)
class Source:
    """A video to encode, or extracted latents.

    Attributes:
        path: the file.
        name: path below the common folder of all videos, as stored.
        key: key of the sample.
        folder_label: class of its folder, see `SourceSet`; None where the folder is none of the given classes, and
            the video needs a label of its own.
        label: class from a list, which takes precedence, or None.
        actions: file of actions, from a list or beside the video, which takes precedence over the video's own; or None.
        flip: whether its frames are mirrored, left to right.
    """

    path: Path
    name: str
    key: str
    folder_label: int | None
    label: int | None = None
    actions: Path | None = None
    flip: bool = False

    @property
    def label_file(self) -> Path | None:
        """The .npz file that may hold its label: the video itself or the file of its actions."""
        return next((path for path in (self.path, self.actions) if path and _is_npz(path)), None)

    @property
    def label_sidecar(self) -> Path | None:
        """The file of its actions if that may hold its label."""
        return self.actions if self.actions is not None and self.label_file == self.actions else None


class SourceSet(NamedTuple):
    """Videos and the names of their classes.

    Each folder that contains videos is a class; its name is its path below the folder that was named. If all names are
    numbers, apart from a common beginning, these are the class numbers; otherwise classes are numbered 0, 1, ... in the
    order of their names.

    Attributes:
        sources: the videos, in their order.
        classes: names by class number, or None where only the numbers are known.
        classes_from_folders: whether the names are those of the folders.
    """

    sources: list[Source]
    classes: tuple[str, ...] | None = None
    classes_from_folders: bool = False


def find_sources(path: str | Path, split: str | Path | None = None) -> list[Source]:
    """The videos of `find_source_set`, without labels."""
    return find_source_set(path, split).sources


def find_source_set(
    path: str | Path,
    split: str | Path | None = None,
    labels: int = 0,
    classes: Sequence[str] | None = None,
    as_listed: bool = False,
) -> SourceSet:
    """Find the videos of a folder, of a single file, or of a list (see `far_scale.data.video.video_lists`).

    Args:
        split: one of UCF-101's lists (trainlist01.txt, testlist01.txt, ...): only these videos of the folder are
            taken, with the classes of the classInd.txt beside the list.
        labels: number of classes; 0 for no labels.
        classes: class names; folders with these names are these classes.
        as_listed: keep the order of a list; otherwise its videos are sorted by name.

    Raises:
        UserError: no videos; a list or split with an invalid line; two videos with one key. With labels: a list that
            labels only some of its videos; a folder that is none of the classes.
    """
    path = Path(path)
    if classes is not None and len(classes) > labels:
        raise UserError(f"--labels {labels}: there are {len(classes)} class names; leave --labels out, or raise it")
    if path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        if split is not None:
            raise UserError(f"--split {split}: goes with a folder of videos, not with the list {path}; leave it out")
        source_set = _from_list(path, labels, classes)
        if not as_listed:
            source_set = source_set._replace(sources=sorted(source_set.sources, key=lambda source: source.name))
    else:
        _refuse_text(path)
        videos = find_videos(path)
        if split is not None:
            return _from_split(path, _from_folder(videos, path, 0, None).sources, Path(split), classes)
        source_set = _from_folder(videos, path, labels, classes)
    return check_folder_classes(path, source_set, labels, classes) if labels else source_set


def add_flipped(sources: Sequence[Source]) -> list[Source]:
    """Add a mirrored source after each source.

    Raises:
        UserError: two samples would have the same key.
    """
    result = []
    for source in sources:
        result += [source, replace(source, flip=True, key=source.key[-_MAX_KEY + len(_FLIPPED) :] + _FLIPPED)]
    _check_keys(result)
    return result


def sources_from_paths(
    paths: Sequence[Path], root: Path | None = None, labels: int = 0, classes: Sequence[str] | None = None
) -> SourceSet:
    """Give videos their names, keys and folder classes.

    Args:
        root: class names are paths below it, or below the common folder of all videos where some are not in `root`.
        labels: number of classes; 0 for no labels.
        classes: names of all classes, if they are known.

    Raises:
        UserError: no videos, two with the same key, or a name that is not UTF-8; with labels, two folders of one class.
    """
    if not paths:
        raise UserError("--videos: there is no video here that can be read (.mp4, .avi, .mkv, .npz, ...)")
    parents = [path.absolute().parent for path in paths]
    common, folders = Path(os.path.commonpath(parents)), sorted(set(parents))
    class_root = common if root is None else root.absolute()
    if not common.is_relative_to(class_root) or ".." in common.relative_to(class_root).parts:
        class_root = common
    numbers, names = _number_classes(folders, class_root, common, labels, classes)
    sources = []
    for path, parent in zip(paths, parents, strict=True):
        name = parent.relative_to(common) / path.name
        if not is_valid_path(name.as_posix()):
            raise UserError(f"{str(path)!a}: its name is not in UTF-8; rename it")
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", str(name.with_suffix("")))[-_MAX_KEY:]
        sources.append(Source(path, name.as_posix(), key, numbers[parent]))
    _check_keys(sources)
    return SourceSet(sources, names, classes_from_folders=names is not None and classes is None)


def check_folder_classes(
    path: str | Path, source_set: SourceSet, labels: int, classes: Sequence[str] | None = None
) -> SourceSet:
    """Check the folders' classes against the number of labels; a warning says where their numbers differ.

    Class names are dropped where there are more than labels: then the labels come from the files.

    Args:
        path: what was searched, for the warning.
        labels: number of classes, above 0.
        classes: the class names that the user gave.

    Raises:
        UserError: a folder that is none of the classes, where no file can give its videos a label.
    """
    by_folder = [source for source in source_set.sources if source.label is None]
    for source in by_folder:
        if source.label_file is not None:
            continue
        number, folder = source.folder_label, source.path.parent
        if number is None:
            raise UserError(
                f"{folder}: this folder's name is none of the {len(classes or ())} class names; add it to them, or "
                "take its videos out"
            )
        if number >= labels:
            fix = "raise --labels, or give --classes, a file of the folders' names, one per line"
            raise UserError(f"{folder}: is class {number}, and --labels {labels} has 0 to {labels - 1}; {fix}")
    folders = len({source.path.parent for source in by_folder})
    all_have_files = source_set.classes is None and all(source.label_file for source in by_folder)
    if classes is not None and len(classes) != labels:
        print_warning(f"{path}: {len(classes)} class names, but --labels {labels}")
    elif classes is None and by_folder and folders != labels and not all_have_files:
        what = "class folder" if folders == 1 else "class folders"
        print_warning(f"{path}: {folders} {what}, but --labels {labels}; are all folders there?")
    if source_set.classes is not None and len(source_set.classes) > labels:
        return source_set._replace(classes=None, classes_from_folders=False)
    return source_set


def _check_keys(sources: Iterable[Source]) -> None:
    first: dict[str, Source] = {}
    for source in sources:
        if (other := first.setdefault(source.key, source)) is not source:
            raise UserError(
                f"{source.path}: its sample would have the key {source.key}, as that of {other.path}; rename one"
            )


def _number_classes(
    folders: Sequence[Path], root: Path, common: Path, labels: int, class_names: Sequence[str] | None
) -> tuple[dict[Path, int | None], tuple[str, ...] | None]:
    """Number the classes of folders below `root`, which are all in `common`; also returns the names of all classes."""
    names = {folder: _class_name(folder.relative_to(root)) for folder in folders}
    if class_names is None and list(names.values()) == ["."]:  # all videos in one folder, so its name is not a class
        return {folders[0]: 0}, None
    # without the common beginning, such as `train/` if that is the only folder
    base = common if len(folders) > 1 else common.parent
    short = {folder: _class_name(folder.relative_to(base)) for folder in folders}
    numbers: dict[Path, int | None] = {}
    if class_names is not None:
        known = {name: number for number, name in enumerate(class_names)}
        for folder in folders:
            last = _class_name(Path(folder.name)) if names[folder] == "." else short[folder]
            matches = (name for name in (names[folder], last, _strip_zeros(last)) if name in known)
            numbers[folder] = known.get(next(matches, ""))
        classes = tuple(class_names)
    elif all(is_class_number(name) for name in short.values()):
        numbers.update((folder, int(name)) for folder, name in short.items())
        classes = tuple(map(str, range(labels)))
    else:
        classes = tuple(dict.fromkeys(names.values()))
        known = {name: number for number, name in enumerate(classes)}
        numbers.update((folder, known[name]) for folder, name in names.items())
    first: dict[int, Path] = {}
    for folder, number in numbers.items():
        if labels and number is not None and (other := first.setdefault(number, folder)) is not folder:
            raise UserError(f"{other} and {folder}: are both class {number}, {names[folder]}; rename one, or join them")
    return numbers, classes


def _class_name(folder: Path) -> str:
    """A folder's path in Unicode NFC: macOS and others compose letters differently."""
    return unicodedata.normalize("NFC", folder.as_posix())


def _strip_zeros(name: str) -> str:
    """`7` for `007`; a name that is not a number is unchanged."""
    return str(int(name)) if is_class_number(name) else name


def _refuse_text(path: Path) -> None:
    """Refuse a text file, for which FFmpeg's error would be misleading."""
    if path.suffix.lower() in VIDEO_SUFFIXES or not path.is_file():
        return
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or (start.strip() and b"\0" not in start and _is_utf8(start)):
        raise UserError(
            f"{path}: is a text file, not a video; a list of videos is a .csv file with the header video,label,actions"
            ", or a .jsonl file, and one of UCF-101's lists goes to --split beside --videos FOLDER"
        )


def _is_utf8(start: bytes) -> bool:
    try:
        start[:-4].decode()  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return True


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _from_folder(paths: Sequence[Path], root: Path, labels: int, classes: Sequence[str] | None) -> SourceSet:
    """The videos of a folder; .npz files beside a video of the same name are its actions."""
    videos = {path.with_suffix("") for path in paths if not _is_npz(path)}
    actions = {path.with_suffix(""): path for path in paths if _is_npz(path)}
    video_paths = [path for path in paths if not _is_npz(path) or path.with_suffix("") not in videos]
    source_set = sources_from_paths(video_paths, root if root.is_dir() else root.parent, labels, classes)
    sources = [
        source if _is_npz(source.path) else replace(source, actions=actions.get(source.path.with_suffix("")))
        for source in source_set.sources
    ]
    return source_set._replace(sources=sources)


def _from_list(path: Path, labels: int, classes: Sequence[str] | None) -> SourceSet:
    """The videos of a list, in its order."""
    entries = read_list(path)
    if labels and all(entry.label is None for entry in entries):  # sidecars take precedence over folders
        entries = [
            entry._replace(label=read_label(entry.sidecar))
            if entry.sidecar not in (None, entry.path) and entry.sidecar.is_file()
            else entry
            for entry in entries
        ]
    is_labelled = any(entry.label is not None for entry in entries)
    if labels and is_labelled:
        entries = [
            entry if entry.label is not None else entry._replace(label=_read_own_label(entry)) for entry in entries
        ]
    source_set = sources_from_paths(
        [entry.path for entry in entries], path.parent, 0 if is_labelled else labels, classes
    )
    sources = [
        replace(source, label=entry.label, actions=entry.actions)
        for source, entry in zip(source_set.sources, entries, strict=True)
    ]
    # Numbers in a list have names only where the user gives these.
    names = source_set.classes if classes is not None or not is_labelled else None
    return SourceSet(sources, names, source_set.classes_from_folders and not is_labelled)


def _read_own_label(entry: ListEntry) -> int:
    """Read the label of a video from its own files, where a list labels other videos only.

    Raises:
        UserError: they have none.
    """
    problem = "has no label, and other videos of the list have one"
    for file in (entry.path, entry.actions, entry.sidecar):
        if file is not None and _is_npz(file) and file.is_file():
            try:
                label = read_label(file)
            except UserError as error:
                problem += f" ({error})"
                break
            if label is not None:
                return label
    raise UserError(f"{entry.where}: {entry.path.name} {problem}; give it one, or take the line out")


def _from_split(root: Path, sources: list[Source], split: Path, class_names: Sequence[str] | None) -> SourceSet:
    """The sources in one of UCF-101's lists, with the classes of the classInd.txt beside it.

    Classes are not numbered by folder names: classInd.txt has JumpingJack before JumpRope, whatever the case.
    """
    classes_file = split.with_name(CLASSES_NAME)
    classes = read_class_index(classes_file)
    is_complete = sorted(classes.values()) == list(range(len(classes)))
    names = tuple(sorted(classes, key=classes.__getitem__)) if is_complete else None
    if class_names is not None and names != tuple(class_names):
        raise UserError(
            f"{classes_file}: its classes are not those that were given; leave out --classes and --classes-of"
        )
    by_name = {source.path.relative_to(root).as_posix(): source for source in sources}
    labels = read_split(split, root, by_name, classes)
    return SourceSet([replace(by_name[name], label=labels[name]) for name in sorted(labels)], names)
