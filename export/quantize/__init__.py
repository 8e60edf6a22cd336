"""Weights in 8 and 4 bits: which ones, on which grid, how the graph reads them, and what the grid does to them.

    Draft ─ find ─▶ weights that only products read ─ round ─▶ codes, scales ─ write ─▶ DequantizeLinear in the graph

```
before   W (K, N) float32                                        MatMul(x, W)
after    W.int4 (K, N), W.scale (K / 32, N) ─▶ DequantizeLinear ─▶ MatMul(x, ·)

before   W (E, K, N) float32   Gather(W, expert)                 MatMul(x, ·)
after    Gather(W.int8, expert), Gather(W.scale, expert) ─▶ DequantizeLinear ─▶ MatMul(x, ·)
```
Activations stay as they are. A stack of experts is gathered while it is packed, so only experts that are used are ever
dequantised. Data flow in one direction, in this order of files:

| file | what it knows |
|---|---|
| `scheme` | the codes that there are, and how many weights share a scale |
| `earlier_grid` | arrays: the grid that weights lie on already, to the last bit |
| `rounding` | arrays: from weights to codes and scales, and back |
| `feedback` | arrays: the same by what they are multiplied with |
| `packed` | the same for recipes, one expert at a time |
| `find` | graphs: which weights are asked for, and whether products alone read them |
| `calibrate` | what products are multiplied with, from running the float graph |
| `qmoe` | ONNX Runtime's own operator for all experts of a block |
| `write` | the operators that turn codes back into weights |
| `quantize` | the stage: all of it, and the graph that is right by definition |

Refused, with the reason in a note: a weight that something other than a product reads (a tied embedding), or that
products sum over different axes of. Routers, recurrences, norms, convolutions and embeddings are never candidates;
routers and what is in a loop over time become so when a pattern names them.
"""
