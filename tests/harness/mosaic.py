"""mosaicml-streaming for the tests, which hold our MDS files against it; without it they are skipped.

Importing it imports torchvision, which cannot be loaded beside every torch, and transformers, for parts that have
nothing to do with shards. Where these are missing, empty modules stand in their place while it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


def import_streaming() -> Any:
    """The library's module `streaming`; skips the test where it is not installed."""
    pytest.importorskip("brotli", reason="needs mosaicml-streaming")
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("needs mosaicml-streaming")
    stood_in = {}
    for name in ("multimodal", "text", "vision"):
        stood_in[f"streaming.{name}"] = ModuleType(f"streaming.{name}")
    if importlib.util.find_spec("transformers") is None:
        features = ModuleType("transformers.feature_extraction_utils")
        tokens = ModuleType("transformers.tokenization_utils_base")
        features.BatchFeature = type("BatchFeature", (dict,), {})  # type: ignore[attr-defined]
        tokens.BatchEncoding = type("BatchEncoding", (dict,), {})  # type: ignore[attr-defined]
        stood_in |= {module.__name__: module for module in (ModuleType("transformers"), features, tokens)}
    missing = {name: module for name, module in stood_in.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        import streaming
    finally:
        for name in missing:
            if name.startswith("transformers"):
                sys.modules.pop(name, None)
    return streaming
