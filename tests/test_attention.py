"""Attention, compared with torch.nn.MultiheadAttention and with formulas written out with an N x N table."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ddpm_tutorial.attention import ATTENTION, AttentionBlock, FeedForward, LinearAttention, SelfAttention
from peers import randomised

EXACT = dict(rtol=0, atol=1e-12)    # float64 on both sides


def feature_map(channels=24, height=5, width=3):
    "Not square, so that mixing up height and width is noticed."
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


def made(layer):
    "The layer in float64, with weights so large that the softmax is far from flat."
    layer = randomised(layer).double()
    layer.to_qkv.weight *= 2
    return layer


def multihead_attention(ours, x):
    "What PyTorch's own layer computes from x with the weights of ours."
    channels = x.shape[1]
    theirs = nn.MultiheadAttention(channels, channels//ours.head_dim, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({"in_proj_weight": ours.to_qkv.weight, "in_proj_bias": ours.to_qkv.bias,
                            "out_proj.weight": ours.to_out.weight, "out_proj.bias": ours.to_out.bias})
    pixels = x.flatten(2).transpose(1, 2)
    out, weights = theirs(pixels, pixels, pixels, average_attn_weights=False)
    assert weights.max() > 0.5                                     # not flat
    return out.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("head_dim", [24, 8, 4])
def test_self_attention_against_pytorch(head_dim):
    "One, three and six heads."
    ours, x = made(SelfAttention(24, head_dim)), feature_map()
    assert_close(ours(x), multihead_attention(ours, x), **EXACT)


def test_a_wrong_softmax_axis_is_noticed():
    """Softmax over the queries instead of the keys still trains and draws.

    The comparison above must notice it.
    """
    class WrongAxis(SelfAttention):
        def attend(self, q, k, v):
            return (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-2) @ v
    wrong, x = made(WrongAxis(24, 8)), feature_map()
    assert (wrong(x) - multihead_attention(wrong, x)).abs().max() > 0.1


def test_linear_attention_with_the_whole_table():
    """`softmax(q) (softmax(k)^T v)` with the brackets moved: `(softmax(q) softmax(k)^T) v`.

    In the brackets stands an N x N table of weights, whose rows sum to 1.
    """
    ours, x = made(LinearAttention(24, 8)), feature_map()
    pixels = x.flatten(2).transpose(1, 2)                          # (B, N, C)
    q, k, v = F.linear(pixels, ours.to_qkv.weight, ours.to_qkv.bias).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 8), slice(8, 16), slice(16, 24)):
        queries, keys = q[..., part].exp(), k[..., part].exp()
        queries = queries/queries.sum(dim=2, keepdim=True)         # each query: over the channels of its head
        keys = keys/keys.sum(dim=1, keepdim=True)                  # each channel: over the pixels
        table = torch.einsum("bic,bjc->bij", queries, keys)        # (B, N, N)
        assert_close(table.sum(dim=2), torch.ones_like(table[..., 0]), **EXACT)
        heads.append(table @ v[..., part])
    out = F.linear(torch.cat(heads, dim=2), ours.to_out.weight, ours.to_out.bias)
    expected = out.transpose(1, 2).reshape(x.shape)
    assert_close(ours(x), expected, **EXACT)


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_mixes_positions(kind):
    "One output pixel depends on every input pixel of its own image, and on no pixel of another image."
    attention, x = made(ATTENTION[kind](24, 8)), feature_map().requires_grad_()
    attention(x)[0, :, 2, 1].square().sum().backward()
    assert (x.grad[0].abs().sum(dim=0) > 1e-9).all()
    assert not x.grad[1].any()


def test_feed_forward_does_not_mix_positions():
    "Each output pixel depends on its own input pixel only."
    x = feature_map().requires_grad_()
    randomised(FeedForward(24)).double()(x)[0, :, 2, 1].square().sum().backward()
    reached = x.grad.abs().sum(dim=1) > 0
    assert reached[0, 2, 1] and reached.sum() == 1


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_knows_no_order(kind):
    "If pixels change places, their outputs change places, and nothing else happens."
    attention, x = made(ATTENTION[kind](24, 8)), feature_map()
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    shuffled = x.flatten(2)[..., order].view_as(x)
    assert_close(attention(shuffled).flatten(2), attention(x).flatten(2)[..., order], **EXACT)


@pytest.mark.parametrize("feed_forward", [True, False])
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_block(kind, feed_forward):
    "With torch.nn.functional: norm, attention, sum; then norm, two 1x1 convolutions with a GELU, sum."
    block, x = randomised(AttentionBlock(24, 8, 4, kind, feed_forward)).double(), feature_map()
    assert type(block.attention) is {"self": SelfAttention, "linear": LinearAttention}[kind]
    expected = x + block.attention(F.group_norm(x, 4, block.norm.weight, block.norm.bias, eps=1e-5))
    if feed_forward:
        norm, (one, two) = block.feed_forward[0], block.feed_forward[1].children()
        h = F.group_norm(expected, 4, norm.weight, norm.bias, eps=1e-5)
        h = torch.einsum("oi,bihw->bohw", one.weight[:, :, 0, 0], h) + one.bias[:, None, None]
        h = h*0.5*(1 + torch.erf(h/2**0.5))
        h = torch.einsum("oi,bihw->bohw", two.weight[:, :, 0, 0], h) + two.bias[:, None, None]
        expected = expected + h
    assert_close(block(x), expected, **EXACT)


def test_what_cannot_work_is_refused():
    "Heads or groups that do not divide the channels, and an unknown kind."
    with pytest.raises(ValueError, match="cannot be split into heads of 7"): SelfAttention(24, 7)
    with pytest.raises(ValueError, match=r"choose num_groups among \[1, 2, 3, 4, 6, 8, 12, 24\]"):
        AttentionBlock(24, 8, 5)
    with pytest.raises(ValueError, match="kind must be one of"): AttentionBlock(24, 8, 4, "quadratic")
