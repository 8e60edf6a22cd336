"""SelfAttention against torch's scaled_dot_product_attention, in float64."""

import pytest
import torch
import torch.nn.functional as F

from moe_export.models.attention import SelfAttention


def reference(attention, values, keys, query, mask):
    def heads(x):
        return x.reshape(x.shape[0], x.shape[1], attention.heads, -1).transpose(1, 2)

    q, k, v = heads(attention.queries(query)), heads(attention.keys(keys)), heads(attention.values(values))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.fc_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("n", "q", "k"), [(1, 1, 1), (2, 10, 10), (3, 1, 8), (2, 7, 4)])
@pytest.mark.parametrize("heads", [1, 4])
def test_equals_torch(n, q, k, heads):
    attention = SelfAttention(16, heads).double()
    values, keys = torch.randn(2, n, k, 16, dtype=torch.float64)
    query = torch.randn(n, q, 16, dtype=torch.float64)
    out = attention(values, keys, query)
    torch.testing.assert_close(out, reference(attention, values, keys, query, None))


@pytest.mark.parametrize("shape", [(7, 10), (2, 1, 1, 10), (2, 4, 7, 10)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.int64])
def test_a_zero_in_the_mask_hides_a_key(shape, dtype):
    attention = SelfAttention(16, 4).double()
    values, keys = torch.randn(2, 2, 10, 16, dtype=torch.float64)
    query = torch.randn(2, 7, 16, dtype=torch.float64)
    mask = torch.rand(shape) > 0.5
    mask[..., 0] = True  # every query sees a key
    out = attention(values, keys, query, mask.to(dtype))
    torch.testing.assert_close(out, reference(attention, values, keys, query, mask))


def test_causal_mask_hides_the_future():
    attention = SelfAttention(16, 4).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    before = attention(x, x, x, mask)
    x[:, 4:] += 1.0
    after = attention(x, x, x, mask)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_query_that_sees_nothing_is_finite(dtype):
    attention = SelfAttention(16, 4).to(dtype)
    x = torch.randn(2, 5, 16, dtype=dtype)
    out = attention(x, x, x, torch.zeros(5, 5))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="embed_size=16 is not a multiple of heads=3"):
        SelfAttention(16, 3)
