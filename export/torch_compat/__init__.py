"""The one door to what PyTorch, onnxscript and transformers do not promise: private names, and patches.

A name that begins with an underscore may move in any release, and a patch holds as long as nobody rewrites what it
replaces. All of them stand here, so that a new PyTorch breaks this folder and nothing else:

| file | what it opens |
|---|---|
| `nesting` | tuples, dicts and dataclasses as flat lists of leaves, and back |
| `dispatch` | a mode that sees every operator that runs |
| `sizes`, `proxies` | what holds of sizes that may stay symbols; the node that makes a tensor |
| `operators` | what an operator says of itself, and functions without a public name |
| `opaque` | a node that the exporter carries into ONNX as it is |
| `metadata`, `failures` | what the exporter tells of a node; what an error of it is about |
| `modules` | calls of modules that are seen or answered, what `nn.Module` keeps |
| `export_calls` | what a script hands to an exporter |
| `after_export`, `devices` | what a script does with files that were not written, and on a GPU that is not there |
| `length` | `len` of a tensor as a size |
| `lists` | `tolist` of a traced tensor |
| `weight_attributes` | what code hung on weights, for a trace |
| `stack_traces`, `frames` | the user's own lines in stack traces; the line that asks for the truth of a value |
| `higher_order` | what functions given to `while_loop` and its like close over |
| `functions` | what autograd functions of users compute, in another form |
| `transformers` | which of its own forms of a computation a model of transformers takes |
| `checkpoints` | where in a checkpoint each tensor stands |
| `caches` | what is computed anew at every trace and translation, computed once |
| `fake_results` | what an operator gives for tensors of a shape, worked out once in a trace |
| `graph_code` | the Python code of a graph, written when it is called |
| `exact_rules` | the optimizer's constants, compared exactly |
| `rewrite_rules` | at which nodes the rules of the optimizer are tried |

Every file says why the public way is not enough, and which versions it was seen in. Each has a canary,
`tests/export/torch_compat/test_<file>.py`, which fails with a sentence that says what to do when PyTorch is another.
What only knows ONNX imports none of them. `tests/house/test_one_door.py` holds the rest of the code to it.
"""
