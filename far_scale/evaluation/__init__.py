"""Scores of generated videos by protocols: FVD, LPIPS, PSNR and SSIM, with confidence intervals."""
