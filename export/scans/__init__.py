"""Folded loops in ONNX: as `Scan`s of few nodes and little memory, or as products over chunks."""
