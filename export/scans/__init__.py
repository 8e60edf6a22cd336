"""Folded loops in ONNX: as small `Scan`s that need little memory, or as products over chunks."""
