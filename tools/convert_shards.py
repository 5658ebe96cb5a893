#!/usr/bin/env python
"""Convert a shard set between tar and MDS: the command `far-scale convert-shards`."""

from far_scale.cli.convert_shards import main

if __name__ == "__main__":
    main()
