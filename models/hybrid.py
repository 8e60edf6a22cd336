"""A small hybrid language model: a Mamba, an attention and a Mixture-of-Experts block in a row.

The mixture of the three is Jamba's (arXiv:2403.19887).

Glossary:
    b: batch            l: sequence length      d: size of a token's vector
    v: vocabulary       e: experts              k: experts per token
"""

import torch
from torch import Tensor, nn

from moe_export.models.attention import SelfAttention
from moe_export.models.mamba import MambaBlock, RMSNorm
from moe_export.models.sparse_moe import SparseMoe


class HybridLM(nn.Module):
    """Predicts the next token from those before it.

    Args:
        vocab_size: v.
        d_model: d.
        heads: heads of the attention.
        num_experts: e.
        num_experts_per_tok: k.
    """

    def __init__(
        self,
        vocab_size: int = 100,
        d_model: int = 32,
        heads: int = 4,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.mamba_norm = RMSNorm(d_model)
        self.mamba = MambaBlock(d_model)
        self.attention_norm = RMSNorm(d_model)
        self.attention = SelfAttention(d_model, heads)
        self.moe_norm = RMSNorm(d_model)
        self.moe = SparseMoe(d_model, 2 * d_model, num_experts, num_experts_per_tok)
        self.norm = RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Score every next token: (b, l) int64 → (b, l, v)."""
        length = input_ids.shape[1]
        x = self.embedding(input_ids)  # (b, l, d)

        x = x + self.mamba(self.mamba_norm(x))  # (b, l, d)

        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()  # (q, k)
        y = self.attention_norm(x)  # (b, l, d)
        x = x + self.attention(y, y, y, causal)  # (b, l, d)

        y, _ = self.moe(self.moe_norm(x))  # (b, l, d)
        x = x + y

        logits: Tensor = self.lm_head(self.norm(x))  # (b, l, v)
        return logits


torch.manual_seed(0)
model = HybridLM(vocab_size=100, d_model=32)
example_inputs = {"input_ids": torch.randint(0, 100, (2, 10))}

if __name__ == "__main__":
    logits = model(**example_inputs)
    print("logits", tuple(logits.shape))
