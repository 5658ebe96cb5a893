"""Scores of generated videos: FVD and LPIPS with their true networks, and how sure they are."""
