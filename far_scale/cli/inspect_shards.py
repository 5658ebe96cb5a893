"""Describe a shard set, verify or fix it to the last byte, or write an image of its decoded frames."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.data.remote.cache import CACHE_BYTES, NodeCache
from far_scale.data.shards import inspect
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the shard set's folder")
    parser.add_argument("--png", type=Path, help="write a contact sheet of decoded frames here")
    parser.add_argument("--verify", action="store_true", help="read everything: checksums, counts, statistics")
    parser.add_argument(
        "--fix", action="store_true", help="verify, and drop broken and missing shards from the manifest"
    )
    cache_help = "a folder for remote and compressed shards of an adopted set, such as data.cache_dir"
    parser.add_argument("--cache-dir", type=Path, help=cache_help)
    arguments = parser.parse_args()
    node = None if arguments.cache_dir is None else NodeCache(arguments.cache_dir, CACHE_BYTES)
    if arguments.fix:
        print(inspect.fix(arguments.folder, node))
    shard_set = ShardSet.open(arguments.folder, node)
    print(inspect.describe(shard_set))
    if arguments.verify:
        inspect.verify(shard_set)
        print("verified:    checksums, counts and statistics are the manifest's")
    if arguments.png:
        inspect.save_contact_sheet(shard_set, arguments.png)
        print(f"picture:     {arguments.png}")
