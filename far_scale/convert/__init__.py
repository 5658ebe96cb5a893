"""Conversion between model directories and official weights."""
