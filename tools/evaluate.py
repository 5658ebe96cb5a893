#!/usr/bin/env python
"""Compute FVD, LPIPS, PSNR and SSIM by a protocol: the command `far-scale evaluate`."""

from far_scale.cli.evaluate import main

if __name__ == "__main__":
    main()
