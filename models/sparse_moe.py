"""A sparse Mixture-of-Experts block with shared experts.

The routing is Mixtral's (arXiv:2401.04088): softmax, top-k, renormalise. Experts that every token passes
through besides its own are DeepSeekMoE's (arXiv:2401.06066). Each expert runs on the tokens that chose it
and on no others, so the block costs k experts a token however many experts there are.

Glossary:
    b: batch            l: sequence length      d: hidden size
    t: tokens, b * l    e: experts              k: experts per token
    f: width of an expert                       h: tokens that chose one expert, known only at run time
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """SwiGLU feed-forward network (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each row on its own: (h, d) → (h, d)."""
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (h, f)
        out: Tensor = self.down_proj(x)  # (h, d)
        return out


class SparseMoe(nn.Module):
    """Routed and shared experts with the gate inside the block.

    Args:
        hidden_size: d.
        intermediate_size: f.
        num_experts: e.
        num_experts_per_tok: k.
        num_shared_experts: experts that see every token, besides the e routed ones.
    """

    def __init__(
        self,
        hidden_size: int = 32,
        intermediate_size: int = 64,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        num_shared_experts: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(
                f"num_experts_per_tok={num_experts_per_tok} must be 1 to num_experts={num_experts}"
            )
        self.num_experts = num_experts
        self.top_k = num_experts_per_tok
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden_size, intermediate_size) for _ in range(num_experts))
        self.shared_experts = nn.ModuleList(
            Expert(hidden_size, intermediate_size) for _ in range(num_shared_experts)
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Send every token through its k experts and through the shared ones.

        Args:
            hidden_states: (b, l, d).

        Returns:
            output: (b, l, d).
            expert_weights: (t, k), what each chosen expert counts, the largest first; a row sums to 1.
        """
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        tokens = hidden_states.reshape(-1, hidden_dim)  # (t, d)

        router_logits = self.gate(tokens)  # (t, e)
        routing_weights = F.softmax(router_logits, dim=-1)  # (t, e)
        expert_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)  # (t, k), (t, k)
        expert_weights = expert_weights / expert_weights.sum(dim=-1, keepdim=True)

        # expert_mask[i] says which tokens chose expert i, and as which of their k choices.
        expert_mask = F.one_hot(selected_experts, num_classes=self.num_experts)  # (t, k, e)
        expert_mask = expert_mask.permute(2, 1, 0)  # (e, k, t)

        output = torch.zeros_like(tokens)  # (t, d)
        for expert_idx in range(self.num_experts):
            idx, top_x = torch.nonzero(expert_mask[expert_idx], as_tuple=True)  # (h,), (h,)
            expert_output = self.experts[expert_idx](tokens[top_x])  # (h, d)
            expert_output = expert_output * expert_weights[top_x, idx].unsqueeze(-1)  # (h, d) * (h, 1)
            output.index_add_(0, top_x, expert_output)

        for shared_expert in self.shared_experts:
            output = output + shared_expert(tokens)  # (t, d)

        return output.reshape(batch_size, sequence_length, hidden_dim), expert_weights


torch.manual_seed(0)
model = SparseMoe(hidden_size=32, intermediate_size=64, num_experts=8, num_experts_per_tok=2)
example_inputs = (torch.randn(2, 10, 32),)

if __name__ == "__main__":
    output, expert_weights = model(*example_inputs)
    print("output", tuple(output.shape))
    print("expert_weights", tuple(expert_weights.shape))
