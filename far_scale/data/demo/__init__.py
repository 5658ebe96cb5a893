"""The demo world: mazes, an explorer, and episodes that are recorded of it."""
