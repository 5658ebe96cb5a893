"""Convert a shard set between tars (WebDataset) and MDS files (mosaicml-streaming), losslessly both ways.

Run it again to resume after a kill.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.data.remote.cache import CACHE_BYTES, NodeCache
from far_scale.data.shards.convert import convert
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the shard set's folder")
    parser.add_argument("--out", type=Path, required=True, help="the new set's folder")
    parser.add_argument("--format", choices=["mds", "tar"], required=True, help="what to convert to")
    cache_help = "a folder for remote and compressed shards of an adopted set, such as data.cache_dir"
    parser.add_argument("--cache-dir", type=Path, help=cache_help)
    arguments = parser.parse_args()
    node = None if arguments.cache_dir is None else NodeCache(arguments.cache_dir, CACHE_BYTES)
    made = convert(ShardSet.open(arguments.folder, node), arguments.out, arguments.format)
    print(
        f"{arguments.out}: {len(made.shards)} shards, {made.samples} samples, "
        f"{sum(shard.bytes for shard in made.shards) / 1e6:.1f} MB"
    )
