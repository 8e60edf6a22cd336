"""From a user's model file to ONNX graphs.

```
model.py ─▶ load ─▶ trace ─▶ routing ─▶ gate ─┐
             │        │                       ├▶ (einsum_rewrite) ─▶ emit ─▶ simplify ─▶ write
          Subject   Traced ───────────────────┘                        │
                                                                   onnx_ir.Model
```

| file | what it does |
|---|---|
| `load`, `script`, `arguments` | find the model in a file: by name, by class, or by its first call |
| `subject`, `leaves` | the module with named tensors in and named tensors out |
| `accept`, `state` | wrappers off, refusals early; buffers that a call changes |
| `trace`, `dims`, `widen`, `idioms` | `torch.export` with every dimension free; names and ranges of dimensions |
| `randomness`, `notes` | what cannot be verified; what the report should say |
| `routing`, `choice`, `weights`, `region` | recognise gates in the traced graph by what they do |
| `gate` | cut one out |
| `emit`, `spelling`, `untranslated` | ONNX by the exporter; forms that it knows, and what it does not know |
| `opset`, `provenance` | exactly the opset asked for; where each node comes from |
| `naming`, `functions` | names from modules and variables; modules as functions |
| `simplify` | onnxsim's proposal, taken if it is smaller and right |
| `parallel_placement`, `parallel_lower`, `parallel_dispatch` | who has which experts; a rank's part of a block |
| `parallel_stages`, `parallel_collectives`, `parallel_ranks` | a graph cut where ranks exchange; all ranks of a model |
| `parallel_manifest`, `parallel_picture` | what the graphs of ranks are, as JSON and as a picture |
| `pipeline` | all of it in order |
| `weights_files`, `weights_stand_in`, `weights_zero`, `weights_values` | weights in files: opened, stood in for |
| `weights_recipe`, `weights_follow`, `weights_place` | where a weight is stored, and what is done to it |
| `stream_write`, `write` | weights as a stream, copied or referenced; whole files or none |
| `source` | lines of the user's code, for errors and metadata |
"""

from __future__ import annotations

try:
    from moe_export.export.load import load_subject
    from moe_export.export.pipeline import Graph, Options, export_subject
    from moe_export.export.subject import Subject
    from moe_export.export.trace import Traced, trace
except ModuleNotFoundError as error:  # its files that only know ONNX are used where PyTorch is not installed
    if error.name != "torch":
        raise

__all__ = ["Graph", "Options", "Subject", "Traced", "export_subject", "load_subject", "trace"]
