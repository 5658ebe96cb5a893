"""The demo world: mazes, an explorer, and recorded episodes."""
