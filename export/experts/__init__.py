"""Mixture-of-experts blocks: recognised in a traced program, outlined, and expanded as an engine wants them.

    fx.Graph ─▶ axes ─▶ find ─▶ Experts ─▶ outline ─▶ Block ─▶ translated ─▶ Opaque ─▶ expand ─▶ ir.Graph

Data passes in that direction only. `Experts` is what every way to write a block comes to: the chosen experts (N, k),
and a body, `(token (R,), slot (R,), expert (1,), *shared, *weights) → (R, H)`, whose rows are added up over the slots.
What axes mean, which indices are a choice, where gates are 0 and what a list lists is asked of `export/axes`.

| before anything is looked for | |
|---|---|
| `canonical` | copies are passed by; value numbers; the nodes between two values in one form, to compare experts by |
| `flat_tokens`, `flat_values` | tokens of several axes become one |
| `derived` | what blocks write: masked indices, entries of gates, choices side by side |

| how a block is found (`recognise` asks them in turn) | |
|---|---|
| `find`, `body`, `slot_loops` | loops: `Selection`s, `Iteration`s, a `Chain`; the parts of all experts compared |
| `pairs`, `combine`, `inline` | all pairs at once: followed from the choice to where slots are added up |
| `rows`, `row_rules` | what that follows: `Rows`, a `Region`, a `PairBody`; the table of operators |
| `row_wise`, `row_order`, `row_columns` | its rules: row by row, orders, lists |
| `picked` | the chosen ones of all experts' results, as rows of those |
| `listed` | lists of pairs, as `nonzero` gives them |
| `dense` | all experts for all tokens |
| `capacity`, `capacity_views`, `capacity_terms`, `capacity_facts` | masks with a capacity: split, proved |
| `capacity_pairs` | their values for pairs |
| `one_expert`, `trial` | of all three: one expert cut out along the experts' axis; proved by running it |
| `mixing` | rows that depend on other rows: refused |
| `left_as_written`, `lost`, `notes` | what is no block, and why |

| how it is written | |
|---|---|
| `outline`, `batch` | `Block`s: an opaque node each, and the body traced for any R, or for several experts |
| `choose`, `expand` | which lowering; the opaque node as an `Opaque`, written by it |
| `body_parts`, `sorting`, `weights` | what lowerings share: prologue, core, epilogue; pairs by expert; stacks |
| `one_at_a_time`, `batched`, `contrib`, `trt_moe` | the lowerings |
"""
