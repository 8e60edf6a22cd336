"""Multi-head scaled dot-product attention (arXiv:1706.03762), written with einsum.

Glossary:
    n: batch            q: query length         k, l: key and value length
    h: heads            d: size of a head       embed_size: h * d
"""

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Attention with `heads` heads.

    Args:
        embed_size: size of a token's vector.
        heads: h; must divide embed_size.
    """

    def __init__(self, embed_size: int = 32, heads: int = 4) -> None:
        super().__init__()
        if embed_size % heads:
            raise ValueError(f"embed_size={embed_size} is not a multiple of heads={heads}")
        self.heads = heads
        self.head_dim = embed_size // heads
        self.values = nn.Linear(embed_size, embed_size, bias=False)
        self.keys = nn.Linear(embed_size, embed_size, bias=False)
        self.queries = nn.Linear(embed_size, embed_size, bias=False)
        self.fc_out = nn.Linear(embed_size, embed_size)

    def forward(self, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let every query look at every key that the mask allows.

        Args:
            values: (n, l, embed_size).
            keys: (n, l, embed_size).
            query: (n, q, embed_size).
            mask: broadcasts to (n, h, q, k), such as (q, k); 0 or False hides a key from a query.

        Returns:
            (n, q, embed_size).
        """
        n = query.shape[0]
        value_len, key_len, query_len = values.shape[1], keys.shape[1], query.shape[1]

        values = self.values(values).reshape(n, value_len, self.heads, self.head_dim)  # (n, l, h, d)
        keys = self.keys(keys).reshape(n, key_len, self.heads, self.head_dim)  # (n, k, h, d)
        queries = self.queries(query).reshape(n, query_len, self.heads, self.head_dim)  # (n, q, h, d)

        energy = torch.einsum("nqhd,nkhd->nhqk", [queries, keys])  # (n, h, q, k)
        energy = energy / self.head_dim**0.5
        if mask is not None:
            # The lowest finite number, not -inf: a query whose keys are all hidden must not become NaN.
            energy = energy.masked_fill(mask == 0, torch.finfo(energy.dtype).min)
        attention = torch.softmax(energy, dim=3)  # (n, h, q, k)

        out = torch.einsum("nhql,nlhd->nqhd", [attention, values])  # (n, q, h, d)
        out = out.reshape(n, query_len, self.heads * self.head_dim)  # (n, q, embed_size)
        projected: Tensor = self.fc_out(out)
        return projected


torch.manual_seed(0)
model = SelfAttention(embed_size=32, heads=4)


def example_inputs() -> dict[str, Tensor]:
    """Seven queries on ten keys; query i sees the keys up to i + 3."""
    generator = torch.Generator().manual_seed(0)
    return {
        "values": torch.randn(2, 10, 32, generator=generator),
        "keys": torch.randn(2, 10, 32, generator=generator),
        "query": torch.randn(2, 7, 32, generator=generator),
        "mask": torch.ones(7, 10, dtype=torch.bool).tril(diagonal=3),
    }


if __name__ == "__main__":
    out = model(**example_inputs())
    print("out", tuple(out.shape))
