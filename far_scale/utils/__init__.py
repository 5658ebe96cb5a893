"""Helpers for all other parts; they import none of them."""
