"""The blocks that the toolkit is shown and tested with, written in their authors' idioms.

Each file stands alone as a `model.py` would: it ends with `model` and `example_inputs`, and runs as a
script. None of them knows anything about exporting.

moe_gate:    the DeepSeek gate alone, with its balance loss in both forms
sparse_moe:  routed and shared experts, a loop over experts that gathers their tokens
gshard_moe:  top-1 and top-2 gating into a fixed number of slots, dispatch and combine by einsum
attention:   multi-head attention by einsum
mamba:       the selective scan as a loop over time
mamba2:      state space duality, chunked
hybrid:      a small language model of Mamba, attention and experts
"""
