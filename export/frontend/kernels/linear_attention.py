"""Linear attention and delta rules: the functions of `fla.ops` as one recurrence, from a table of what each is given.

    S(t) = decay(t) S(t-1) + k(t) v(t)ᵀ                      y(t) = scale q(t)ᵀ S(t)
    with beta, v(t) is replaced by beta(t) (v(t) - p(t)ᵀ decay(t) S(t-1)), where p is what is erased: k, or its own key
    with a and b, b(t) (a(t)ᵀ S(t-1)) is added
    with a bonus u, y(t) = scale q(t)ᵀ (S(t-1) + u k(t) v(t)ᵀ): the step's own pair is weighted, not decayed

A kernel by chunks, a fused and a step-by-step one compute the same, and are the same function here.

Source: the papers (GLA, arXiv:2312.06635; RetNet, arXiv:2307.08621; DeltaNet, arXiv:2406.06484; Gated DeltaNet,
arXiv:2412.06464; RWKV-6, arXiv:2404.05892; RWKV-7, arXiv:2503.14456; KDA, arXiv:2510.26692; GSA, arXiv:2409.07146) and
the package's documented signatures, https://github.com/fla-org/flash-linear-attention.

Letters: b batch, l length, h heads, k size of a key, v size of a value, m slots. Sequences are (b, l, h, …), states
(b, h, k, v).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_export.export.frontend.kernels.refusals import refuse_arguments

Result = tuple[Tensor, Any]

_TAIL = ("scale", "initial_state", "output_final_state")
_SPEED = {
    "backend", "checkpoint_level", "chunk_indices", "chunk_size", "cu_seqlens_cpu", "disable_recompute", "safe_gate",
}  # fmt: skip
"""Arguments that choose how a kernel computes, not what."""
_REFUSED = {"cp_context", "cu_seqlens", "offsets", "output_attentions", "return_intermediate_states"}


@dataclass(frozen=True)
class Kernel:
    """A function of `fla.ops`.

    Attributes:
        order: Its arguments by position, as `name` or `name>role`.
        tail: Those behind them.
        defaults: What holds where an argument is not given.
        heads_first: Whether its sequences are (b, h, l, …).
        output_only: Whether it returns the output alone.
    """

    order: str
    tail: tuple[str, ...] = _TAIL
    defaults: Mapping[str, Any] = field(default_factory=dict)
    heads_first: bool = False
    output_only: bool = False


_GATED_DELTA = "q k v g gk gv beta"
_RETENTION = Kernel("q k v", defaults={"retention": True})
_LINEAR = Kernel("q k v", defaults={"normalize": True})
_KDA = {"A_log": None, "dt_bias": None, "gate": "kda"}
_LIGHTNING = Kernel("q k v layer_idx num_layers")

# fmt: off
KERNELS: Mapping[str, Kernel] = {
    **dict.fromkeys(("chunk_gla", "fused_chunk_gla"), Kernel("q k v g>gk")),
    "fused_recurrent_gla": Kernel("q k v gk gv"),
    "naive_recurrent_gla": Kernel("q k v gk", _TAIL[1:]),
    **dict.fromkeys(
        ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"), Kernel("q k v g g_gamma>gamma")),
    **dict.fromkeys(("parallel_simple_gla", "naive_recurrent_simple_gla"), Kernel("q k v g")),
    **dict.fromkeys(
        ("chunk_retention", "fused_chunk_retention", "fused_recurrent_retention", "parallel_retention"), _RETENTION),
    "naive_retention": Kernel("q k v", (), {"retention": True}, heads_first=True, output_only=True),
    **dict.fromkeys(("chunk_linear_attn", "fused_chunk_linear_attn"), _LINEAR),
    **dict.fromkeys(("fused_recurrent_linear_attn", "naive_recurrent_linear_attn"), Kernel("q k v")),
    **dict.fromkeys(("chunk_lightning_attn", "fused_recurrent_lightning_attn"), _LIGHTNING),
    **dict.fromkeys(
        ("chunk_delta_rule", "fused_chunk_delta_rule", "fused_recurrent_delta_rule"), Kernel("q k v beta")),
    "delta_rule_recurrence": Kernel("q k v beta", _TAIL[1:], {"output_final_state": True}, heads_first=True),
    **dict.fromkeys(("chunk_gated_delta_rule", "chunk_gdn"), Kernel("q k v g beta", defaults={"gate": "gdn"})),
    **dict.fromkeys(
        ("fused_recurrent_gated_delta_rule", "fused_recurrent_gdn"), Kernel(_GATED_DELTA, defaults={"gate": "gdn"})),
    "naive_recurrent_gated_delta_rule": Kernel("q k v beta g"),
    "naive_chunk_gated_delta_rule": Kernel("q k v g beta chunk_size"),
    "chunk_kda": Kernel("q k v g>gk beta", defaults=_KDA),
    "fused_recurrent_kda": Kernel("q k v g>gk beta A_log dt_bias", defaults=_KDA),
    "naive_recurrent_kda": Kernel("q k v g>gk beta"),
    "chunk_comba": Kernel("q k v p>erase g beta"),
    "fused_recurrent_comba": Kernel("q k p>erase v g beta"),
    "naive_recurrent_comba": Kernel("q k v p>erase beta g"),
    **dict.fromkeys(("chunk_dplr_delta_rule", "fused_recurrent_dplr_delta_rule"), Kernel("q k v a b gk")),
    **dict.fromkeys(("chunk_iplr_delta_rule", "fused_recurrent_iplr_delta_rule"), Kernel("q k v a b")),
    "chunk_rwkv7": Kernel("r>q w>gk k v a b", defaults={"scale": 1.0}),
    "fused_recurrent_rwkv7": Kernel("r>q w>gk k v a b", defaults={"output_final_state": True}),
    **dict.fromkeys(("chunk_rwkv6", "fused_recurrent_rwkv6"), Kernel("r>q k v w>gk u>bonus")),
    "naive_recurrent_rwkv6": Kernel("q k v w>gk u>bonus", heads_first=True),
}
# fmt: on


def _function(name: str, kernel: Kernel) -> Callable[..., Any]:
    """A function of the table, with its own argument names and order."""
    roles = {word.partition(">")[0]: word.partition(">")[2] or word for word in kernel.order.split()}
    order = (*roles, *kernel.tail)

    def function(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(order):
            raise TypeError(f"{name}() takes {len(order)} arguments by position, not {len(args)}")
        given = dict(kernel.defaults) | dict(zip(order, args, strict=False)) | kwargs
        refuse_arguments(name, **{key: given.pop(key) for key in _REFUSED & given.keys()})
        first = bool(given.pop("head_first", kernel.heads_first))
        named = {roles.get(key, key): value for key, value in given.items() if key not in _SPEED}
        if first:
            named = {key: _seen_by_heads(key, value) for key, value in named.items()}
        y, state = recurrence(**named)
        y = y.transpose(1, 2) if first else y
        return y if kernel.output_only else (y, state)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"`fla.ops.{name}({', '.join(order)})`: (output, last state or None)."
    return function


_SEQUENCES = ("q", "k", "v", "g", "gk", "gv", "beta", "a", "b", "erase")


def _seen_by_heads(role: str, value: Any) -> Any:
    """A sequence (b, h, l, …) as (b, l, h, …)."""
    return value.transpose(1, 2) if role in _SEQUENCES and isinstance(value, Tensor) else value


def recurrence(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    normalize: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    retention: bool = False,
    layer_idx: int | None = None,
    num_layers: int = 1,
    erase: Tensor | None = None,
    beta: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    **decays: Any,
) -> Result:
    """The output, in the dtype of v, and the last state.

    Args:
        q: (b, l, h, k).
        k: (b, l, h, k).
        v: (b, l, H, v), where H is a multiple of h.
        scale: Of q; 1 / sqrt(k) if it is not given.
        initial_state: (b, H, k, v); with `normalize` also a pair of that and a sum of keys, (b, 1, h, k).
        output_final_state: Whether to return a state.
        reverse: Whether time runs backwards.
        state_v_first: Whether states are (b, H, v, k).
        normalize: Whether to divide by q times the sum of the keys so far.
        use_qk_l2norm_in_kernel: Whether q and k are brought to length 1.
        retention: Whether head i decays by 1 - 2^(-5-i).
        layer_idx: Of lightning attention, whose decays depend on it.
        num_layers: See layer_idx.
        erase: What a delta rule erases, (b, l, h, k); k if it is not given.
        beta: (b, l, H) or (b, l, H, v), makes it a delta rule.
        use_beta_sigmoid_in_kernel: Whether beta is yet to go through a sigmoid.
        allow_neg_eigval: Whether that sigmoid is doubled.
        decays: Logarithms of decays, and what else is multiplied into the state; see `_Step`.
    """
    heads = v.shape[2]
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    q, k, values = (x.float() for x in (q, k, v))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
        erase = None if erase is None else l2norm(erase.float())
    total = None
    if normalize and isinstance(initial_state, tuple):
        initial_state, total = initial_state
    if normalize:
        norm, total = _key_sums(q * factor, k, total, reverse)
    if retention:
        decays["gamma"] = torch.log1p(-torch.exp2(-5.0 - torch.arange(q.shape[2], dtype=torch.float32)))
    if layer_idx is not None:
        slope = -8 / heads * (1 - layer_idx / num_layers)
        decays["gamma"] = slope * torch.arange(heads, dtype=torch.float32)
    if beta is not None:
        beta = beta.float()
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0) if use_beta_sigmoid_in_kernel else beta
    step = _Step.of(q * factor, k, values, erase, beta, **decays)
    h = q.new_zeros(q.shape[0], heads, k.shape[-1], values.shape[-1])
    if initial_state is not None:
        start = initial_state.float()
        h = h + (start.transpose(-1, -2) if state_v_first else start)
    ys = []
    for t in range(values.shape[1])[:: -1 if reverse else 1]:
        y, h = step.at(t, h)
        ys.append(y)
    out = torch.stack(ys[::-1] if reverse else ys, dim=1)  # (b, l, H, v)
    if normalize:
        out = out / (norm + 1e-10)
    state = h.transpose(-1, -2) if state_v_first else h
    last = ((state, total) if normalize else state) if output_final_state else None
    return out.to(v.dtype), last


def _key_sums(q: Tensor, k: Tensor, start: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """Q times the sum of the keys so far, (b, l, h, 1), and the sum of all, (b, 1, h, k)."""
    sums = k.flip(1).cumsum(1).flip(1) if reverse else k.cumsum(1)
    sums = sums if start is None else sums + start
    return (q * sums).sum(-1, keepdim=True), sums[:, :1] if reverse else sums[:, -1:]


@dataclass(frozen=True)
class _Step:
    """What a step reads; all in float32, with as many heads as v has."""

    q: Tensor
    k: Tensor
    v: Tensor
    erase: Tensor
    beta: Tensor | None
    g: Tensor | None = None  # (b, l, H)
    gk: Tensor | None = None  # (b, l, H, k)
    gv: Tensor | None = None  # (b, l, H, v)
    gamma: Tensor | None = None  # (H,), the same at all times
    a: Tensor | None = None  # (b, l, H, k)
    b: Tensor | None = None  # (b, l, H, k)
    bonus: Tensor | None = None  # (H, k)

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        erase: Tensor | None,
        beta: Tensor | None,
        *,
        gate: str | None = None,
        use_gate_in_kernel: bool = False,
        A_log: Tensor | None = None,
        dt_bias: Tensor | None = None,
        lower_bound: float | None = None,
        **decays: Tensor | None,
    ) -> _Step:
        """What `recurrence` was given, with its gates computed and its heads repeated."""
        role = "gk" if gate == "kda" else "g"
        given = decays.get(role)
        if use_gate_in_kernel and given is not None:
            decays[role] = (
                kda_gate(given, A_log, dt_bias, lower_bound)
                if role == "gk"
                else gdn_gate(given, A_log, dt_bias)
            )
        each = v.shape[2] // k.shape[2]
        wide = {
            name: value.repeat_interleave(each, 2) if each > 1 else value
            for name, value in (("q", q), ("k", k), ("erase", k if erase is None else erase.float()))
        }
        more: dict[str, Any] = {
            name: value.float() if isinstance(value, Tensor) else value for name, value in decays.items()
        }
        return cls(**wide, v=v, beta=beta, **more)

    def at(self, t: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """The output at a time, and the state behind it."""
        q, k, v = self.q[:, t], self.k[:, t], self.v[:, t]
        if self.bonus is not None:
            pair = k[..., None] * v[..., None, :]
            y = ((h + self.bonus[..., None] * pair) * q[..., None]).sum(-2)
            return y, self._decayed(t, h) + pair
        before = h
        h = self._decayed(t, h)
        if self.beta is not None:
            beta = self.beta[:, t]
            beta = beta[..., None] if beta.dim() < v.dim() else beta
            v = beta * (v - (h * self.erase[:, t, :, :, None]).sum(-2))
        h = h + k[..., None] * v[..., None, :]
        if self.a is not None and self.b is not None:
            read = (before * self.a[:, t, :, :, None]).sum(-2)
            h = h + self.b[:, t, :, :, None] * read[..., None, :]
        return (h * q[..., None]).sum(-2), h

    def _decayed(self, t: int, h: Tensor) -> Tensor:
        if self.gamma is not None:
            h = h * torch.exp(self.gamma)[:, None, None]
        if self.g is not None:
            h = h * torch.exp(self.g[:, t])[..., None, None]
        if self.gk is not None:
            h = h * torch.exp(self.gk[:, t])[..., None]
        if self.gv is not None:
            h = h * torch.exp(self.gv[:, t])[..., None, :]
        return h


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """(…, d) at length 1."""
    y = x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + eps)
    return y.to(output_dtype or x.dtype)


def kda_gate(
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decays in logarithms, (…, h, k): -exp(A) softplus(g + bias), or between a bound and 0."""
    g = g.float()
    if dt_bias is not None:
        g = g + dt_bias.float().view(g.shape[-2], -1)
    factor = None if A_log is None else A_log.float().exp().view(g.shape[-2], 1)
    if lower_bound is not None:
        return (lower_bound * torch.sigmoid(g if factor is None else factor * g)).to(output_dtype)
    assert factor is not None, "A_log is needed without lower_bound"
    return (-factor * F.softplus(g)).to(output_dtype)


def gdn_gate(
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decays in logarithms, (…, h): -exp(A) softplus(g + bias)."""
    assert A_log is not None, "the gate needs A_log"
    g = g.float() if dt_bias is None else g.float() + dt_bias.float()
    return (-A_log.float().exp() * F.softplus(g)).to(output_dtype)


def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **options: Any,
) -> Result:
    """`h(t) = exp(g(t)) h(t-1) + x(t)`: (b, l, d) → (b, l, d), and the last h if it is asked for."""
    refuse_arguments("hgrn", **{key: value for key, value in options.items() if key not in _SPEED})
    inputs, decay = x.float(), torch.exp(g.float())
    h = inputs.new_zeros(x.shape[0], x.shape[2])
    h = h if initial_state is None else h + initial_state.float()
    ys = []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + inputs[:, t]
        ys.append(h)
    return torch.stack(ys, dim=1).to(x.dtype), h if output_final_state else None


chunk_hgrn = naive_recurrent_hgrn = fused_recurrent_hgrn


def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    **options: Any,
) -> Result:
    """Attention over slots: two recurrences, a softmax over the slots between them.

    Args:
        q: (b, l, H, k), where H is a multiple of h.
        k: (b, l, h, k).
        v: (b, l, h, v).
        s: (b, l, h, m), what is written into each slot.
        g: (b, l, h, m), the logarithm of what a slot keeps; without it, s are scores of a softmax over time.
        scale: Of q.
        initial_state: (b, h, k, m) and (b, h, m, v).
        output_final_state: Whether to return these.
        reverse: Whether time runs backwards.
        options: How to compute.
    """
    refuse_arguments("gsa", **{key: value for key, value in options.items() if key not in _SPEED})
    s = s.float()
    if g is None:
        total = s.logcumsumexp(1)
        g = torch.cat([total[:, :1], total[:, :-1]], dim=1) - total
        s = torch.exp(s - total)
    each = q.shape[2] // k.shape[2]
    if each > 1:
        k, v, s, g = (x.repeat_interleave(each, 2) for x in (k, v, s, g))
        initial_state = initial_state and tuple(x.repeat_interleave(each, 1) for x in initial_state)  # type: ignore[assignment]
    first, second = initial_state or (None, None)
    options = {"output_final_state": True, "reverse": reverse}
    scores, keys = recurrence(q=q, k=k, v=s, gv=g, scale=scale, initial_state=first, **options)
    y, values = recurrence(
        q=scores.softmax(-1), k=s, v=v.float(), gk=g, scale=1.0, initial_state=second, **options
    )
    return y.to(v.dtype), (keys[:, ::each], values[:, ::each]) if output_final_state else None


fused_recurrent_gsa = naive_recurrent_gsa = chunk_gsa


def chunk_abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    **options: Any,
) -> Result:
    """`chunk_gsa` whose slots are a softmax over time."""
    return chunk_gsa(q, k, v, s, None, None, initial_state, output_final_state, **options)


def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float | None = 1.0,
    *args: Any,
    **options: Any,
) -> Result:
    """RWKV-7's recurrence given the removed key and its rate: a is -kk, b is kk a."""
    found: Result = FUNCTIONS["fused_recurrent_dplr_delta_rule"](
        r, k, v, -kk, kk * a, w, scale, *args, **options
    )
    return found


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    name: _function(name, kernel) for name, kernel in KERNELS.items()
}


def __getattr__(name: str) -> Callable[..., Any]:
    """A function of the table as if it were written here."""
    if name not in FUNCTIONS:
        raise AttributeError(f"no kernel {name}")
    return FUNCTIONS[name]
