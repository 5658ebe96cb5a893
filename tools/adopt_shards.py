#!/usr/bin/env python
"""Index existing WebDataset or MDS latents as a shard set: the command `far-scale adopt-shards`."""

from far_scale.cli.adopt_shards import main

if __name__ == "__main__":
    main()
