"""Attention, compared with torch.nn.MultiheadAttention and with formulas written out with an N x N table."""
import pytest
import torch
from peers import randomised
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ddpm_tutorial.attention import (
    ATTENTION,
    AttentionBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
    SelfAttention,
)

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


# --- cross-attention ---

def made_cross(channels=24, context_dim=10, head_dim=8):
    "As `made`: in float64, with weights so large that the softmax is far from flat."
    layer = randomised(CrossAttention(channels, context_dim, head_dim)).double()
    for linear in (layer.to_q, layer.to_kv): linear.weight *= 2
    return layer


def rows(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASKS = {
    "all": lambda b, m: torch.ones(b, m, dtype=torch.bool),
    "texts of several lengths": lambda b, m: torch.arange(m) <= torch.arange(b)[:, None] % m,
    "with gaps": lambda b, m: (torch.arange(m) + torch.arange(b)[:, None]) % 3 != 1,
    "only the last": lambda b, m: (torch.arange(m) == m - 1).expand(b, m),
}


def multihead_cross_attention(ours, x, context, mask):
    "What PyTorch's own layer computes with the weights of ours, and its weights (B, heads, N, M)."
    channels, width = ours.to_q.in_features, ours.to_kv.in_features
    theirs = nn.MultiheadAttention(channels, channels//ours.head_dim, kdim=width, vdim=width,
                                   batch_first=True, dtype=torch.float64)
    q, (k, v) = ours.to_q.weight, ours.to_kv.weight.chunk(2)
    if width == channels: own = {"in_proj_weight": torch.cat([q, k, v])} # then it has a single matrix
    else: own = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
    theirs.load_state_dict({**own, "in_proj_bias": torch.cat([ours.to_q.bias, ours.to_kv.bias]),
                            "out_proj.weight": ours.to_out.weight, "out_proj.bias": ours.to_out.bias})
    ignored = None if mask is None else ~mask
    return theirs(x, context, context, key_padding_mask=ignored, average_attn_weights=False)


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("b, n, m, width, head_dim", [
    (2, 15, 7, 10, 8), (3, 1, 4, 24, 24), (1, 6, 2, 40, 4), (4, 3, 9, 1, 6)])
def test_cross_attention_against_pytorch(b, n, m, width, head_dim, kind):
    "Several sizes, widths and masks, and none. The weights are equal, too, and add up to 1."
    ours, x, context = made_cross(24, width, head_dim), rows(b, n, 24), rows(b, m, width, seed=2)
    mask = MASKS[kind](b, m) if kind else None
    expected, table = multihead_cross_attention(ours, x, context, mask)
    assert_close(ours(x, context, mask), expected, **EXACT)
    weights, values = ours.weights_and_values(x, context, mask)
    assert weights.shape == (b, 24//head_dim, n, m) and values.shape == (b, 24//head_dim, m, head_dim)
    assert_close(weights, table, **EXACT)
    assert_close(weights.sum(dim=-1), torch.ones(b, 24//head_dim, n, dtype=torch.float64), **EXACT)
    if mask is not None: assert not weights.permute(0, 3, 1, 2)[~mask].any()


@pytest.mark.parametrize("dtype, huge", [(torch.float64, 1e100), (torch.float32, 1e30)])
@pytest.mark.parametrize("kind", list(MASKS)[1:])
def test_a_masked_row_never_changes_the_answer(kind, dtype, huge):
    "Whatever stands in it, the answer is the same to the last bit, and no gradient reaches it."
    ours, mask = made_cross().to(dtype), MASKS[kind](3, 6)
    x, context = rows(3, 5, 24).to(dtype), rows(3, 6, 10, seed=2).to(dtype)
    spoilt = torch.where(mask[..., None], context, huge*context)
    assert torch.equal(ours(x, spoilt, mask), ours(x, context, mask))
    without_mask = ours(x, context + ~mask[..., None]) - ours(x, context)
    assert (without_mask.abs().amax(dim=(1, 2)) > 0.01).equal((~mask).any(dim=1))
    context.requires_grad_()
    ours(x, context, mask).square().sum().backward()
    assert not context.grad[~mask].any() and (context.grad[mask].abs().sum(dim=1) > 0).all()


def test_rows_that_are_left_out_are_as_masked_ones():
    "Each image alone, without its padding."
    ours, mask = made_cross(), MASKS["texts of several lengths"](4, 6)
    x, context = rows(4, 5, 24), rows(4, 6, 10, seed=2)
    out = ours(x, context, mask)
    for i in range(4): assert_close(ours(x[i:i + 1], context[i:i + 1, mask[i]])[0], out[i], **EXACT)


def test_cross_attention_knows_no_order():
    """If rows of the context change places, nothing happens.

    If the rows that ask change places, so do their answers.
    """
    ours, mask = made_cross(), MASKS["with gaps"](3, 6)
    x, context = rows(3, 5, 24), rows(3, 6, 10, seed=2)
    out, order = ours(x, context, mask), torch.randperm(6, generator=torch.Generator().manual_seed(3))
    assert_close(ours(x, context[:, order], mask[:, order]), out, **EXACT)
    assert (ours(x, context[:, order], mask) - out).abs().max() > 0.1
    assert_close(ours(x.flip(1), context, mask), out.flip(1), **EXACT)


def test_gradients_of_cross_attention():
    "Against finite differences, for the rows that ask, the context and every weight."
    ours, mask = made_cross(4, 3, 2).requires_grad_(), torch.tensor([[True, True, False]])
    x, context = rows(1, 2, 4).requires_grad_(), rows(1, 3, 3, seed=2).requires_grad_()
    weights = dict(ours.named_parameters())
    def answer(x, context, *values):
        return torch.func.functional_call(ours, dict(zip(weights, values)), (x, context, mask))
    assert torch.autograd.gradcheck(answer, (x, context, *weights.values()))


@pytest.mark.parametrize("feed_forward", [True, False])
@pytest.mark.parametrize("kind", ATTENTION)
def test_block_with_a_context(kind, feed_forward):
    "With torch.nn: the pixels ask one another, then the context, then comes the feed-forward; each is added."
    block, x = randomised(AttentionBlock(24, 8, 4, kind, feed_forward, 10)).double(), feature_map()
    context, mask = rows(2, 6, 10), MASKS["texts of several lengths"](2, 6)
    h = x + block.attention(F.group_norm(x, 4, block.norm.weight, block.norm.bias, eps=1e-5))
    normed = F.group_norm(h, 4, block.cross_norm.weight, block.cross_norm.bias, eps=1e-5)
    asked, _ = multihead_cross_attention(block.cross, normed.flatten(2).transpose(1, 2), context, mask)
    h = h + asked.transpose(1, 2).reshape(x.shape)
    if feed_forward: h = h + block.feed_forward(h)
    assert_close(block(x, context, mask), h, **EXACT)


def test_a_context_that_cannot_be_asked():
    "Heads that do not divide the channels. A block without a context has no weights for one."
    with pytest.raises(ValueError, match="24 channels cannot be split into heads of 7; choose a head_dim"):
        CrossAttention(24, 10, 7)
    with pytest.raises(ValueError, match="heads of 7"): AttentionBlock(24, 7, 4, context_dim=10)
    plain = AttentionBlock(24, 8, 4)
    assert plain.cross is None and not any("cross" in name for name in plain.state_dict())
