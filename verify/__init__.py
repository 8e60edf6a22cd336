"""Compare any two engines on the same inputs, and say whether they are equal.

```
 specs, dims, example ─▶ cases ─▶ Case ─┬─▶ reference.run ─┐
                                        └─▶ candidate.run ─┴─▶ judge, judge_routing ─▶ Report ─▶ table, JSON,
                                                                     ▲                           exit code
                                                                 Tolerance
```

| file | holds |
|---|---|
| `specs` | what crosses the border: arrays, `TensorSpec`, `DimRange`, `RoutingPair` |
| `runner` | the protocol of an engine |
| `torch_runner`, `onnxruntime_runner`, `tensorrt_runner` | the engines; libraries are imported when used |
| `engine_header` | what an engine says of itself: version, GPUs, size |
| `onnx_reference_runner` | the evaluator of the ONNX project |
| `inputs`, `sizes`, `maker`, `regimes` | the plan: which cases, which sizes, their arrays, which kinds of values |
| `known`, `price`, `meaning`, `graph_numbers` | what fixes it: what a case costs, what values mean, limits |
| `torch_work`, `torch_tables` | counted, and watched, while a model runs |
| `tolerance`, `judge`, `routing`, `sketch` | when two outputs are the same; what is kept of their differences |
| `experts_alone` | every token to one expert, for each |
| `golden` | inputs and outputs of a run, stored |
| `choices`, `truth`, `error_model`, `torch_modes` | outputs that differ: the same choices; a float64 run |
| `compare` | the loop |
| `cost`, `einsum_cost` | FLOPs and bytes of a graph, counted over a run |
| `report`, `reading` | what was found, as data; read back from JSON and judged again |
| `table`, `page`, `junit`, `github` | the same as text, as an HTML page, for CI |
| `guilty`, `guilty_gap`, `guilty_difference`, `guilty_reference` | the node where a wrong graph goes wrong |
| `guilty_level`, `guilty_turns`, `guilty_optimised` | inside bodies, turn by turn; only as optimised |
| `guilty_overlay`, `repro` | each node's error for Netron; a fault as a folder that runs |
| `float64_graph`, `float64_operators` | a graph in float64 |
| `bodies` | the graphs within a graph, and what nodes read through them |
| `mutants`, `mutants_weights`, `mutants_nodes`, `mutants_baked` | wrong copies of a right graph: can the gate fail? |
| `parallel`, `parallel_group`, `parallel_watch` | ranks as processes: run and compare them, exchange, see who died |
| `parallel_manifest`, `parallel_rank`, `parallel_slices`, `parallel_in_graph` | what ranks run, whose rows are whose |
| `torch_compat`, `onnxruntime_errors` | what PyTorch does not promise; what ONNX Runtime says when it fails |

A new engine is a class with a `name` and a `run`; nothing else here needs to know of it.
"""

from __future__ import annotations

from moe_export.verify.choices import Choice, Teller, Told
from moe_export.verify.compare import compare
from moe_export.verify.inputs import Case, cases
from moe_export.verify.judge import Judgement, Worst, judge
from moe_export.verify.onnxruntime_runner import OnnxRuntimeRunner
from moe_export.verify.report import SCHEMA, CaseResult, Report, Row
from moe_export.verify.routing import judge_routing
from moe_export.verify.runner import RunFailedError, Runner
from moe_export.verify.specs import Array, DimRange, RoutingPair, TensorSpec
from moe_export.verify.table import show
from moe_export.verify.tensorrt_runner import TensorRtRunner
from moe_export.verify.tolerance import DEFAULTS, FlipBudget, Margin, Tolerance
from moe_export.verify.torch_runner import TorchRunner

__all__ = [
    "DEFAULTS",
    "SCHEMA",
    "Array",
    "Case",
    "CaseResult",
    "Choice",
    "DimRange",
    "FlipBudget",
    "Judgement",
    "Margin",
    "OnnxRuntimeRunner",
    "Report",
    "RoutingPair",
    "Row",
    "RunFailedError",
    "Runner",
    "Teller",
    "TensorRtRunner",
    "TensorSpec",
    "Told",
    "Tolerance",
    "TorchRunner",
    "Worst",
    "cases",
    "compare",
    "judge",
    "judge_routing",
    "show",
]
