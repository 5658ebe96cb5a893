#!/usr/bin/env python
"""Show, verify or fix a shard set: the command `far-scale inspect-shards`."""

from far_scale.cli.inspect_shards import main

if __name__ == "__main__":
    main()
