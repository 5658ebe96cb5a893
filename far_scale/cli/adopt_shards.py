"""Make a shard set from existing latents, WebDataset tars or MDS files, without copying them.

Indexes and a manifest are written; the shards are only read. Run it again to resume after a kill.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from far_scale.data.adopt.adopt import adopt
from far_scale.data.adopt.detect import FormatOptions
from far_scale.data.adopt.sources import find_shards
from far_scale.data.shards.adopted import Layout
from far_scale.data.shards.rejects import REJECTED_NAME
from far_scale.data.video.video_lists import read_class_names
from far_scale.utils.command_line import above_zero, at_least, command_line, fraction


def rate_or_part(text: str) -> str | float:
    """Frames per second, or the member that holds them."""
    try:
        return above_zero(text)
    except ValueError:
        return text


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sources_help = "tars, folders of tars, folders with an index.json of mosaicml-streaming, .txt lists of these, or "
    sources_help += "URLs (s3://, gs://, https://, pipe:) of tars or of an index.json; with braces as in WebDataset, "
    sources_help += "set-{000000..000123}.tar"
    parser.add_argument("sources", nargs="+", help=sources_help)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for manifest and indexes")
    parser.add_argument("--autoencoder", required=True, help="name or path of the autoencoder that made the latents")
    part = "as MEMBER or MEMBER:KEY (a tar's member is what follows the key and its dot; of MDS files it is the column)"
    parser.add_argument("--latents", help=f"where the latents are, {part}; unless given, the only member that can be")
    layout_help = (
        "the axes of the latents as stored: frames, channels, height, width; unless given, FCHW, if the first "
    )
    layout_help += "sample's shape can be no other"
    parser.add_argument("--layout", choices=get_args(Layout), help=layout_help)
    scale_help = "factor that the stored latents were multiplied by; they are divided by it"
    parser.add_argument("--scale-factor", type=above_zero, default=1.0, help=scale_help)
    parser.add_argument("--actions", type=at_least(0), default=0, help="number of action classes; 0 reads no actions")
    parser.add_argument("--actions-in", help=f"where the actions are, {part}: an integer per frame")
    parser.add_argument("--labels", type=at_least(0), default=0, help="number of label classes; 0 reads no labels")
    parser.add_argument("--label-in", help=f"where the label is, {part}; unless given, cls or json:label")
    parser.add_argument("--classes", type=Path, help="a file of the labels' names, one per line")
    fps_help = "frames per second of all samples, or where they are; unless given, json:fps or fps"
    parser.add_argument("--fps", type=rate_or_part, help=fps_help)
    name_help = (
        "the column of MDS files that names samples; unless given, __key__, key or id, or else they are numbered"
    )
    parser.add_argument("--name-in", help=name_help)
    rejected_help = "largest fraction of samples that may be broken; rejected.jsonl lists them"
    parser.add_argument("--max-rejected", type=fraction, default=0.0, help=rejected_help)
    parser.add_argument("--jobs", type=at_least(1), default=1, help="processes that read shards")
    arguments = parser.parse_args()
    classes = None if arguments.classes is None else read_class_names(arguments.classes)
    manifest = adopt(
        find_shards(arguments.sources),
        arguments.out,
        arguments.autoencoder,
        FormatOptions(
            layout=arguments.layout,
            scale_factor=arguments.scale_factor,
            latents=arguments.latents,
            actions_in=arguments.actions_in,
            label_in=arguments.label_in,
            fps=arguments.fps,
            name_in=arguments.name_in,
            actions=arguments.actions,
            labels=arguments.labels or len(classes or ()),
        ),
        classes,
        arguments.max_rejected,
        arguments.jobs,
    )
    rejected = arguments.out / REJECTED_NAME
    print(
        f"{arguments.out}: {len(manifest.shards)} shards, {manifest.samples} samples, {manifest.frames} frames"
        + (f"; some samples are rejected, see {rejected}" if rejected.exists() else "")
    )
