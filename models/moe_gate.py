"""The gate of DeepSeekMoE (arXiv:2401.06066) and DeepSeek-V2 (arXiv:2405.04434).

A gate chooses `k` of `e` experts for every token and says how much each of them counts. While training it
also returns a loss that pulls the load of the experts together, in one of two forms: over each sequence
(`seq_aux=True`) or over all tokens of the batch.

Glossary:
    b: batch            l: sequence length      d: hidden size
    t: tokens, b * l    e: experts              k: experts per token
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MoEGate(nn.Module):
    """Chooses the top `k` experts by softmax score.

    Args:
        hidden_size: d.
        num_experts: e.
        num_experts_per_tok: k.
        norm_topk_prob: make the k weights of a token sum to 1.
        routed_scaling_factor: multiplies the weights when they are not normalised.
        aux_loss_alpha: the weight of the balance loss; 0 turns it off.
        seq_aux: balance each sequence instead of the whole batch.
    """

    def __init__(
        self,
        hidden_size: int = 32,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        aux_loss_alpha: float = 0.001,
        seq_aux: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(
                f"num_experts_per_tok={num_experts_per_tok} must be 1 to num_experts={num_experts}"
            )
        self.num_experts = num_experts
        self.top_k = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))  # (e, d)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight as `nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """Route every token.

        Args:
            hidden_states: (b, l, d).

        Returns:
            topk_idx: (t, k) int64, in no particular order.
            topk_weight: (t, k), belonging to topk_idx.
            aux_loss: a scalar tensor while training, the Python int 0 otherwise.
        """
        bsz, seq_len, h = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, h)  # (t, d)
        logits = F.linear(hidden_states, self.weight)  # (t, e)
        scores = logits.softmax(dim=-1)  # (t, e)

        # Nothing below depends on the order of a token's experts, so they need not be sorted.
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)  # (t, k), (t, k)

        # A single weight would become 1 whatever its score, and the gate would learn nothing.
        if self.top_k > 1 and self.norm_topk_prob:
            denominator = topk_weight.sum(dim=-1, keepdim=True) + 1e-20  # (t, 1)
            topk_weight = topk_weight / denominator
        else:
            topk_weight = topk_weight * self.routed_scaling_factor

        if not (self.training and self.alpha > 0.0):
            return topk_idx, topk_weight, 0
        if self.seq_aux:
            return topk_idx, topk_weight, self.sequence_loss(scores, topk_idx, bsz, seq_len)
        return topk_idx, topk_weight, self.token_loss(scores, topk_idx)

    def sequence_loss(self, scores: Tensor, topk_idx: Tensor, bsz: int, seq_len: int) -> Tensor:
        """Balance within each sequence (DeepSeek-V2, section 2.2.3).

        Args:
            scores: (t, e).
            topk_idx: (t, k).
            bsz: b.
            seq_len: l.

        Returns:
            alpha * mean over b of the sum over e of (load of e) * (mean score of e), a scalar.
        """
        chosen = topk_idx.view(bsz, seq_len * self.top_k)  # (b, l*k)
        ce = torch.zeros(bsz, self.num_experts, dtype=scores.dtype, device=scores.device)  # (b, e)
        ce.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
        ce = ce.div_(seq_len * self.top_k / self.num_experts)  # 1 where the load is even
        mean_scores = scores.view(bsz, seq_len, -1).mean(dim=1)  # (b, e)
        return (ce * mean_scores).sum(dim=1).mean() * self.alpha

    def token_loss(self, scores: Tensor, topk_idx: Tensor) -> Tensor:
        """Balance over all tokens of the batch (DeepSeekMoE, section 3.3).

        Args:
            scores: (t, e).
            topk_idx: (t, k).

        Returns:
            alpha * sum over e of (load of e) * (mean score of e), a scalar.
        """
        mask_ce = F.one_hot(topk_idx.view(-1), num_classes=self.num_experts)  # (t*k, e)
        fi = mask_ce.to(scores.dtype).mean(dim=0) * self.num_experts  # (e,)
        pi = scores.mean(dim=0)  # (e,)
        return (pi * fi).sum() * self.alpha


torch.manual_seed(0)
model = MoEGate(hidden_size=32, num_experts=8, num_experts_per_tok=2)
example_inputs = (torch.randn(2, 10, 32),)

if __name__ == "__main__":
    model.eval()
    topk_idx, topk_weight, aux_loss = model(*example_inputs)
    print("topk_idx", tuple(topk_idx.shape))
    print("topk_weight", tuple(topk_weight.shape))
    print("aux_loss", aux_loss)
