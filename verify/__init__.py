"""Compare any two engines on the same inputs, and say whether they are equal.

```
 specs, dims, example ─▶ cases ─▶ Case ─┬─▶ reference.run ─┐
                                        └─▶ candidate.run ─┴─▶ judge, judge_routing ─▶ Report ─▶ table, JSON,
                                                                     ▲                           exit code
                                                                 Tolerance
```

| folder or file | holds |
|---|---|
| `specs` | what crosses the border: arrays, `TensorSpec`, `DimRange`, `RoutingPair` |
| `runner` | the protocol of an engine |
| `compare` | the loop over all cases |
| `decoding` | a decoder run in parts, as an engine |
| `golden` | inputs and outputs of a run, stored |
| `bodies` | the graphs within a graph, and what nodes read through them |
| `float64_graph`, `float64_operators` | a graph in float64 |
| `torch_compat` | what PyTorch does not promise |
| **`inputs`** | which cases there are |
| `inputs/cases`, `inputs/sizes`, `inputs/maker`, `inputs/regimes` | the plan: cases, sizes, arrays, kinds of values |
| `inputs/known`, `inputs/price`, `inputs/meaning`, `inputs/graph_numbers` | what fixes it: cost, meaning, limits |
| `inputs/torch_tables` | what integer inputs are used for, seen while a model runs |
| `inputs/experts_alone` | every token to one expert, for each |
| **`runners`** | the engines; libraries are imported when used |
| `runners/torch_runner`, `runners/torch_modes` | PyTorch, with the same choices or in float64 |
| `runners/onnxruntime_runner`, `runners/onnxruntime_errors` | ONNX Runtime, and what it says when it fails |
| `runners/tensorrt_runner`, `runners/tensorrt_buffers` | TensorRT; memory for inputs and outputs |
| `runners/engine_loading`, `runners/engine_header` | loading an engine; its version, GPUs, size |
| `runners/engine_profile`, `runners/kernel_cache` | what an engine takes; kernels that it compiled |
| `runners/openvino_runner`, `runners/openvino_errors` | OpenVINO, and what it says when it fails |
| `runners/onnx_reference_runner` | the evaluator of the ONNX project |
| **`judging`** | when two outputs are the same |
| `judging/tolerance`, `judging/judge`, `judging/routing` | margins; one output; expert ids |
| `judging/sketch` | what is stored of their differences |
| `judging/replay`, `judging/truth`, `judging/error_model` | outputs that differ: the same choices; a float64 run |
| **`cost`** | counted over a run |
| `cost/graph_cost`, `cost/einsum_cost`, `cost/torch_work` | FLOPs and bytes of a graph; operators of a PyTorch model |
| **`reports`** | what was found |
| `reports/findings`, `reports/report`, `reports/reading` | as data; printed and as JSON; read back and judged again |
| `reports/table`, `reports/beside` | as text; several candidates as one table |
| `reports/page`, `reports/junit`, `reports/github` | as an HTML page, for CI |
| **`localise`** | the first faulty node of a wrong graph |
| `localise/search`, `localise/gap`, `localise/difference` | the search; one node's own error; how it differs |
| `localise/level`, `localise/iterations` | a graph or a body to cut nodes out of; a body, iteration by iteration |
| `localise/reference`, `localise/optimised` | right values; a fault that only the optimiser makes |
| `localise/overlay`, `localise/repro` | each node's error for Netron; a fault as a folder that runs |
| **`mutants`** | wrong copies of a right graph: would a comparison notice? |
| `mutants/mutant`, `mutants/weights`, `mutants/nodes` | all kinds; constants; nodes |
| `mutants/packed`, `mutants/baked` | codes, scales and zero points; baked answers |
| **`parallel`** | ranks as processes |
| `parallel/run`, `parallel/group`, `parallel/watch` | run and compare them; exchange; see who died |
| `parallel/manifest`, `parallel/rank`, `parallel/slices`, `parallel/in_graph` | what ranks run, whose rows are whose |

A new engine is a class with a `name` and a `run`; nothing else here needs to know of it.
"""

from __future__ import annotations

from moe_export.verify.compare import compare
from moe_export.verify.inputs.cases import Case, cases
from moe_export.verify.judging.judge import Judgement, Worst, judge
from moe_export.verify.judging.replay import Choice, Replay, Replayer
from moe_export.verify.judging.routing import judge_routing
from moe_export.verify.judging.tolerance import DEFAULTS, FlipBudget, Margin, Tolerance
from moe_export.verify.reports.findings import CaseResult, Row
from moe_export.verify.reports.report import SCHEMA, Report
from moe_export.verify.reports.table import show
from moe_export.verify.runner import NoMemoryError, RunFailedError, Runner
from moe_export.verify.runners.onnxruntime_runner import OnnxRuntimeRunner
from moe_export.verify.runners.tensorrt_runner import TensorRtRunner
from moe_export.verify.runners.torch_runner import TorchRunner
from moe_export.verify.specs import Array, DimRange, RoutingPair, TensorSpec

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
    "NoMemoryError",
    "OnnxRuntimeRunner",
    "Replay",
    "Replayer",
    "Report",
    "RoutingPair",
    "Row",
    "RunFailedError",
    "Runner",
    "TensorRtRunner",
    "TensorSpec",
    "Tolerance",
    "TorchRunner",
    "Worst",
    "cases",
    "compare",
    "judge",
    "judge_routing",
    "show",
]
