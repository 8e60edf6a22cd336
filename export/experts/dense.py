"""Dense dispatch: MoE blocks in which every expert computes every token, and weights of 0 drop what was not chosen.

All E experts run on all N tokens, laid out as (E, N, ...) or (E*N, ...), by `bmm` with stacked weights; a matrix of
weights (N, E) multiplies the inputs or the outputs, and the experts are added up. The weights are 0 for experts that
were not chosen (`axes/support`), so the sum is over the chosen ones:

    out[n] = sum over e of body(n, e) = sum over the slots s of body(n, idx[n, s])

if the body is 0 where the weight is 0. That is checked on random numbers: an expert with a bias after its weighted
input is not 0 there, and stays as it was written.

Letters: N tokens, k slots, E experts, R rows of a body.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.chosen import name_once
from moe_export.export.axes.operators import TURNS
from moe_export.export.axes.shapes import arguments, rank_of, shape_of
from moe_export.export.axes.support import supports_in
from moe_export.export.experts.body import Experts
from moe_export.export.experts.row_rules import rows_after
from moe_export.export.experts.rows import PairBody, Region, Rows, runs_over_pairs
from moe_export.export.frontend.source import line_of
from moe_export.export.gates.region import ancestors, is_float
from moe_export.export.sizes import Size, fixed, same_shape, same_size

_aten = torch.ops.aten


class _DenseRegion(Region):
    """All tokens at all experts, (E, N, ...) or (E*N, ...)."""

    @property
    def slots(self) -> int:
        return self.count

    @property
    def pairs(self) -> Size:
        return self.tokens * self.count

    def leads(self, shape: tuple[object, ...], lead: int) -> bool:  # type: ignore[override]
        begin = [self.pairs] if lead == 1 else [self.count, self.tokens]
        return same_shape(shape[:lead], begin)


class _DenseBody(PairBody):
    """A body in which only stacks of weights may have an axis over experts, and only shared values one over tokens."""

    def _lined_up(self, node: fx.Node, rows: Rows, rank: int) -> fx.Node:
        if not runs_over_pairs(node, rows, rank):
            return self.share(node)
        of_experts = same_shape(shape_of(node)[:2], [self.region.count, 1])
        if rows.lead == 2 and rank_of(node) == rank and of_experts:
            return self.as_rows(self.stack(node))
        raise RefusedError(f"{node.name} is neither a weight of the experts nor a value of the tokens")


def find_dense(graph: fx.Graph) -> Iterator[Experts]:
    """Every block in which all experts compute all tokens."""
    found = set[fx.Node]()
    for node, chosen in supports_in(graph).items():
        matrix = is_float(node) and fixed(shape_of(node)[1]) is not None
        turned = any(user.target in TURNS for user in node.users)  # to (E, N), as the experts' rows are
        if not (matrix and turned) or rank_of(chosen) != 2 or not name_once(chosen):
            continue
        try:
            block = _understand(node, chosen)
        except RefusedError:  # an expert reads what belongs neither to it nor to its token
            continue
        if block is not None and block.result not in found:
            found.add(block.result)
            yield block


def _understand(weights: fx.Node, indices: fx.Node) -> Experts | None:
    region = _DenseRegion(indices, int(shape_of(weights)[1]), {})
    for node in weights.graph.nodes:
        if node.op != "call_function":
            continue
        result = _added_up(region, node)
        if result is not None and weights in ancestors([result]):
            return _block(region, weights, node, result)
        known = _seed(region, node, weights) or _product(region, node)
        if known is None and not region.rows.keys().isdisjoint(node.all_input_nodes):
            known = rows_after(region, node)
        if known is not None:
            region.rows[node] = known
    return None


def _seed(region: _DenseRegion, node: fx.Node, weights: fx.Node) -> Rows | None:
    """What a node runs over, if it is tokens repeated for every expert, or the weights transposed to (E, N)."""
    source = arguments(node)[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in TURNS and source is weights:
        return Rows(2, None, lambda body: _own_weight(body, weights))
    if source in region.rows or not same_shape(shape_of(source)[:1], [region.tokens]):
        source = _unsqueezed(source)
    if source is None or not same_shape(shape_of(source)[:1], [region.tokens]):
        return None
    rest = rank_of(source) - 1
    if node.target is _aten.repeat.default and arguments(node)[1] == [region.count, *[1] * rest]:
        return Rows(1, None, lambda body: body.call(_aten.index.Tensor, body.share(source), [body.token]))
    if node.target is _aten.expand.default and rank_of(node) == rest + 2 and region.leads(shape_of(node), 2):
        return Rows(2, None, lambda body: _spread(body, source))
    return None


def _unsqueezed(node: fx.Node) -> fx.Node | None:
    """The x of `x.unsqueeze(0)` and `x[None]`; None for any other node."""
    return arguments(node)[0] if node.target is _aten.unsqueeze.default and arguments(node)[1] == 0 else None


def _own_weight(body: PairBody, weights: fx.Node) -> fx.Node:
    one = body.call(_aten.index.Tensor, body.share(weights), [body.token, body.expert])
    return body.call(_aten.unsqueeze.default, one, 1)


def _spread(body: PairBody, source: fx.Node) -> fx.Node:
    rows = body.call(_aten.index.Tensor, body.share(source), [body.token])
    return body.call(_aten.unsqueeze.default, rows, 1)


def _product(region: _DenseRegion, node: fx.Node) -> Rows | None:
    """(E, N, a) times the stack (E, a, b)."""
    if node.target not in (_aten.bmm.default, _aten.matmul.default):
        return None
    source, stack = arguments(node)
    rows = region.rows.get(source)
    if rows is None or rows.where != (2, None) or stack in region.rows:
        return None
    if rank_of(source) != 3 or rank_of(stack) != 3 or not same_size(shape_of(stack)[0], region.count):
        return None
    return Rows(
        2,
        None,
        lambda body: body.call(_aten.matmul.default, body.value(source), body.stack(stack)),
        weighs=True,
    )


def _added_up(region: _DenseRegion, node: fx.Node) -> fx.Node | None:
    """The rows (E, N, ...) that a node adds up over the experts; None if it does not."""
    if (
        node.target is not _aten.sum.dim_IntList
        or list(arguments(node)[1] or []) != [0]
        or len(arguments(node)) > 2
    ):
        return None
    source = arguments(node)[0]
    rows = region.rows.get(source)
    return source if rows is not None and rows.where == (2, None) and rows.weighs else None


def _block(region: _DenseRegion, weights: fx.Node, result: fx.Node, rows: fx.Node) -> Experts | None:
    body = _DenseBody(region)
    value = body.call(_aten.squeeze.dim, body.value(rows), 1)
    module = body.module(value)
    if weights not in body.shared or not _drops(module, body, weights):
        return None
    return Experts(
        indices=region.indices,
        count=region.count,
        body=module,
        shared=tuple(body.shared),
        weights=tuple(body.weights),
        start=None,
        result=result,
        line=line_of(result.meta.get("stack_trace")),
    )


def _drops(module: fx.GraphModule, body: PairBody, weights: fx.Node) -> bool:
    """Whether an expert with weight 0 gives 0, whatever else it reads."""
    generator = torch.Generator().manual_seed(0)

    def random(node: fx.Node, sizes: list[int]) -> torch.Tensor:
        value = torch.randn(sizes, generator=generator).to(node.meta["val"].dtype)
        return torch.zeros_like(value) if node is weights else value

    inputs = [random(node, [_size(size) for size in shape_of(node)]) for node in body.shared]
    for weight in body.weights:
        if weight.stack is None:
            return False
        inputs.append(random(weight.stack, [_size(size) for size in shape_of(weight.stack)[1:]]))
    rows = torch.arange(3)
    with torch.no_grad():
        found = module(rows, torch.zeros_like(rows), torch.zeros(1, dtype=torch.int64), *inputs)
    return bool((found == 0).all())


def _size(size: object) -> int:
    """A size for the random numbers: 3 if it is free."""
    number = fixed(size)
    return 3 if number is None else number
