"""Embeddings, norms and the U-Net, compared with torch functional and with diffusers at the same weights."""
import copy
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from peers import diffusers_unet, double, mirrored_unet, our_steps, randomised
from torch.nn import functional as F
from torch.testing import assert_close

from ddpm_tutorial.attention import AttentionBlock, CrossAttention
from ddpm_tutorial.embeddings import AdaGN, ClassEmbedding, group_norm, sinusoidal_embedding
from ddpm_tutorial.run.checkpoint import PRETRAINED, load_weights
from ddpm_tutorial.run.device import saved_bytes
from ddpm_tutorial.unet import Block, Downsample, ResBlock, UNet, UNetConfig, Upsample, zero_init

EXACT = dict(rtol=0, atol=1e-12)    # float64 on both sides, one layer
ODD = {
    "28 with four levels": UNetConfig(base_channels=16, channel_multipliers=(1, 1, 2, 2), num_groups=4,
                                      head_dim=8, mirrored=False),
    "29": UNetConfig(image_size=29, base_channels=16, channel_multipliers=(1, 2, 2),
                     attention_resolutions=(15,), num_groups=4, head_dim=8),
    "30 in patches of 2": UNetConfig(image_size=30, patch_size=2, base_channels=16,
                                     channel_multipliers=(1, 2), attention_resolutions=(8,), num_groups=4,
                                     head_dim=8, attention="linear")}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(config, n=3):
    "Noisy images, times from both ends, and labels with the null label among them."
    x = draw(n, config.in_channels, config.image_size, config.image_size)
    return x, torch.tensor([0, 500, 999])[:n], torch.tensor([3, config.num_classes, 0])[:n]


@pytest.mark.parametrize("dim", [2, 32, 64])
def test_sinusoidal_embedding_against_diffusers(dim):
    """Cosines first, and the same frequencies, for whole times and others.

    Both compute in float32 and in the same order, so they are equal to 1e-6.
    """
    for t in (torch.arange(1000), torch.tensor([0.25, 37.5])):
        theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert_close(sinusoidal_embedding(t, dim), theirs, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="even"): sinusoidal_embedding(torch.arange(3), 7)


def test_sinusoidal_embedding_in_float64():
    "Against the formula, number by number. In float32, an angle of up to 999 is known to 1e-4."
    t, dim = torch.arange(0, 1000, 37), 16
    angles = t.double()[:, None] * torch.tensor([10_000**(-i/8) for i in range(8)], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert_close(sinusoidal_embedding(t, dim).double(), expected, rtol=0, atol=2e-4)


def test_group_norm():
    "Mean and variance over each group's channels and pixels, by hand."
    norm, x = randomised(group_norm(12, 3)).double(), 3*draw(2, 12, 5, 4) + 1
    groups = x.view(2, 3, 4*5*4)
    mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, keepdim=True, correction=0)
    plain = ((groups - mean)/(variance + 1e-5).sqrt()).view_as(x)
    assert_close(norm(x), plain*norm.weight[:, None, None] + norm.bias[:, None, None], **EXACT)
    assert_close(group_norm(12, 3, affine=False)(x), plain, **EXACT)
    with pytest.raises(ValueError, match=r"12 channels .* choose num_groups among \[1, 2, 3, 4, 6, 12\]"):
        group_norm(12, 5)


def test_adagn():
    "The first half of the projection is the scale, the second half the shift. Each image has its own."
    layer, x, cond = randomised(AdaGN(12, 7, 3)).double(), draw(2, 12, 5, 4), draw(2, 7, seed=1)
    scale_and_shift = F.linear(F.silu(cond), layer.proj.weight, layer.proj.bias)
    scale, shift = scale_and_shift[:, :12, None, None], scale_and_shift[:, 12:, None, None]
    expected = F.group_norm(x, 3, layer.norm.weight, layer.norm.bias, eps=1e-5)*(1 + scale) + shift
    assert_close(layer(x, cond), expected, **EXACT)


def test_class_embedding_has_a_null_row():
    "It has one row more than there are classes. That row is the last one."
    table = ClassEmbedding(10, 4)
    assert table.null_label == 10 and table(torch.tensor([10])).shape == (1, 4)
    for label in (11, -1):
        with pytest.raises(IndexError): table(torch.tensor([label]))


@pytest.mark.parametrize("out_channels", [12, 18])
def test_residual_block(out_channels):
    "Compared with torch functional. Before it has learned anything, the block is its shortcut."
    block, x, cond = ResBlock(12, out_channels, 7, 3).double(), draw(2, 12, 5, 4), draw(2, 7, seed=1)
    assert_close(block(x, cond), block.shortcut(x), rtol=0, atol=0)
    block = randomised(block)
    h = F.silu(F.group_norm(x, 3, block.norm_1.weight, block.norm_1.bias, eps=1e-5))
    h = F.silu(block.norm_2(F.conv2d(h, block.conv_1.weight, block.conv_1.bias, padding=1), cond))
    expected = block.shortcut(x) + F.conv2d(h, block.conv_2.weight, block.conv_2.bias, padding=1)
    assert_close(block(x, cond), expected, **EXACT)


@pytest.mark.parametrize("height, width", [(28, 28), (7, 7), (9, 4), (2, 3)])
def test_down_and_up_stay_in_place(height, width):
    "Pixel k of the small map stands over pixel 2k of the large one, both ways, for even and odd sizes."
    down, up = randomised(Downsample(2)).double(), randomised(Upsample(2, 2)).double()
    x = draw(1, 2, height, width)
    full = F.conv2d(x, down.weight, down.bias, padding=1)   # at every pixel; stride 2 keeps the even ones
    assert_close(down(x), full[..., ::2, ::2], **EXACT)
    small = down(x)
    rows, columns = torch.arange(height)//2, torch.arange(width)//2
    expected = F.conv2d(small[..., rows, :][..., columns], up.weight, up.bias, padding=1)
    assert_close(up(small, (height, width)), expected, **EXACT)


@pytest.mark.parametrize("config", [
    UNetConfig(base_channels=32, attention_resolutions=(7, 14), feed_forward=False, mirrored=False),
    UNetConfig(image_size=32, in_channels=3, base_channels=16, channel_multipliers=(1, 2, 2, 3),
               num_res_blocks=2, attention_resolutions=(16, 4), head_dim=8, num_groups=8,
               feed_forward=False, mirrored=False),
    UNetConfig(num_classes=0, patch_size=2, base_channels=16, channel_multipliers=(1, 2), head_dim=16,
               num_groups=4, attention_resolutions=(7,), feed_forward=False, mirrored=False),
], ids=["28x28, three levels", "32x32, four levels, colour", "patches, no classes"])
def test_unet_against_diffusers(config):
    """With the same random weights in float64, the outputs are equal to 1e-10. They are about 1 in size.

    The times are from both ends, and the null label is among the labels.
    """
    ours = randomised(UNet(config))
    theirs = diffusers_unet(ours)
    def count(model): return sum(parameter.numel() for parameter in model.parameters())
    assert count(ours) == count(theirs)
    assert not any(parameter.isnan().any() for parameter in theirs.parameters())
    ours, theirs, (x, t, labels) = double(ours), theirs.double(), inputs(config)
    patches = F.pixel_unshuffle(x, config.patch_size)
    cond, theirs_cond = ({"labels": labels}, {"class_labels": labels}) if config.num_classes else ({}, {})
    expected = F.pixel_shuffle(theirs(patches, t, **theirs_cond).sample, config.patch_size)
    assert expected.std() > 0.1
    assert_close(ours(x, t, **cond), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [
    UNetConfig(base_channels=16, channel_multipliers=(1, 2, 3), head_dim=8, num_groups=4, feed_forward=False),
    UNetConfig(image_size=32, in_channels=3, num_classes=0, base_channels=16,
               channel_multipliers=(1, 1, 2, 4), num_res_blocks=2, attention_resolutions=(16, 4),
               head_dim=16, num_groups=8, feed_forward=False),
], ids=["28x28, three levels", "32x32, four levels, two blocks, attention, no classes"])
def test_mirrored_unet_against_diffusers_blocks(config):
    """The blocks of diffusers with the same random weights, wired by hand. The outputs are equal to 1e-10.

    There is one block up for each block down, and it gets that block's map.
    """
    ours, (x, t, labels) = randomised(UNet(config)), inputs(config)
    expected = mirrored_unet(ours)(x, t, labels)
    assert expected.std() > 0.1
    cond = {"labels": labels} if config.num_classes else {}
    assert_close(double(ours)(x, t, **cond), expected, rtol=0, atol=1e-10)


def record_sizes(model, part):
    "A list. Whenever the model runs, it gets the size of each block's output on the way down or up."
    sizes = []
    def record(layer, args, out): sizes.append(out.shape[-1])
    for layer in our_steps(model, part):
        if isinstance(layer, Block): layer.register_forward_hook(record)
    return sizes


@pytest.mark.parametrize("name", ODD)
def test_every_resolution_is_reached(name):
    """The maps have the right sizes on the way down and up in the running model.

    The output has the size of the input.
    """
    config = ODD[name]
    model = randomised(UNet(config))
    down, up = record_sizes(model, "down"), record_sizes(model, "up")
    x, t, labels = inputs(config)
    assert model(x.float(), t, labels).shape == x.shape
    expected = {"28 with four levels": [28, 14, 7, 4], "29": [29, 15, 8], "30 in patches of 2": [15, 8]}[name]
    assert list(config.resolutions) == expected
    blocks_up = 1 if config.mirrored else 2
    assert down == expected and up == [size for size in reversed(expected) for _ in range(blocks_up)]
    blocks = [layer for layer in our_steps(model, "down") if isinstance(layer, Block)]
    attends = [isinstance(layer.attention, AttentionBlock) for layer in blocks]
    assert attends == [size in config.attention_resolutions for size in expected]


@pytest.mark.parametrize("name", ODD)
def test_images_do_not_see_each_other(name):
    """An image's output is the same alone and in a batch.

    Its gradient reaches every one of its own pixels, and no pixel of another image.
    """
    config = ODD[name]
    model, (x, t, labels) = double(randomised(UNet(config))), inputs(config)
    out = model(x, t, labels)
    for i in range(3):
        assert_close(model(x[i:i + 1], t[i:i + 1], labels[i:i + 1]), out[i:i + 1], rtol=0, atol=1e-10)
    others = model(torch.cat([x[:1], 9*x[1:]]), t, labels)
    assert_close(others[0], out[0], rtol=0, atol=1e-10)
    x.requires_grad_()
    model(x, t, labels)[1, 0, -1, -1].backward()            # cropping would lose the last row and column
    assert (x.grad[1] != 0).all() and not x.grad[0].any() and not x.grad[2].any()


def test_downsample_sees_its_neighbours_only():
    "Pixel k of the small map sees pixels 2k - 1 ... 2k + 1 of the large one, and no others."
    x = torch.zeros(1, 4, 28, 28, dtype=torch.float64, requires_grad=True)
    model = randomised(Downsample(4)).double()
    model(x)[0, 0, 3, 5].backward()
    rows, columns = x.grad[0].abs().sum(dim=0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 7, 9, 11)


def test_time_and_label_reach_the_output():
    "Another time or label gives another output. No label means the null label. A fresh network predicts 0."
    config = ODD["29"]
    x, t, labels = inputs(config)
    assert not UNet(config)(x.float(), t, labels).any()
    model = double(randomised(UNet(config)))
    out = model(x, t, labels)
    assert (model(x, t + 1, labels) - out).flatten(1).abs().amax(dim=1).min() > 1e-3
    assert (model(x, t, (labels + 1) % 11) - out).flatten(1).abs().amax(dim=1).min() > 1e-3
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 10)))


def test_a_label_is_never_ignored():
    "A model without classes refuses labels. One with classes refuses unknown ones. None takes a context."
    x, t, labels = torch.zeros(1, 1, 28, 28), torch.tensor([0]), torch.tensor([3])
    small = dict(base_channels=8, channel_multipliers=(1,), attention_resolutions=(), head_dim=8,
                 num_groups=4)
    without, with_three = UNet(UNetConfig(num_classes=0, **small)), UNet(UNetConfig(num_classes=3, **small))
    with pytest.raises(ValueError, match="knows no classes"): without(x, t, labels)
    with pytest.raises(IndexError): with_three(x, t, labels + 1)
    context = torch.zeros(1, 7, 32)
    with pytest.raises(ValueError, match="no cross-attention"): with_three(x, t, labels, context)
    assert with_three.null_cond == {"labels": 3} and without.null_cond == {}


@pytest.mark.parametrize("settings, message", [
    (dict(attention_resolutions=(16,)), r"the levels are \(28, 14, 7\)"),
    (dict(image_size=7), "image_size must be at least 8"),
    (dict(image_size=29, patch_size=2, attention_resolutions=()), "does not divide image_size"),
    (dict(image_size=8, channel_multipliers=(1, 1, 1, 1), attention_resolutions=()),
     "too small for 4 levels"),
    (dict(channel_multipliers=()), "channel_multipliers must be"),
    (dict(num_classes=-1), "num_classes must be at least 0"),
    (dict(attention="none"), "attention must be one of"),
    (dict(num_groups=0), "num_groups must be in 1"),
])
def test_what_cannot_be_built_is_refused(settings, message):
    "The error comes when the config is made, and it names the field."
    with pytest.raises(ValueError, match=message): UNetConfig(**settings)


OLD = {
    "small": UNetConfig(),
    "mirrored, two blocks, attention": UNetConfig(
        base_channels=16, channel_multipliers=(2, 1, 3), num_res_blocks=2, attention_resolutions=(14, 7),
        head_dim=8, feed_forward=False),
    "as in DDPM": UNetConfig(
        base_channels=16, channel_multipliers=(1, 2), mirrored=False, head_dim=8, attention="linear"),
    "as in DDPM, three blocks, attention, no classes": UNetConfig(
        num_classes=0, base_channels=16, channel_multipliers=(1, 2, 3, 1), num_res_blocks=3, mirrored=False,
        attention_resolutions=(28, 4), head_dim=8),
    "one level in patches": UNetConfig(
        patch_size=2, base_channels=16, channel_multipliers=(2,), head_dim=8)}


SUMS = [("small", 14.046556, 4466.017143),
        ("mirrored, two blocks, attention", 26.381889, 3238.775899),
        ("as in DDPM", -29.181705, 1668.001656),
        ("as in DDPM, three blocks, attention, no classes", -12.495102, 4298.166711),
        ("one level in patches", -2.397021, 1340.800496)]


def both(*names): return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def old_stage(config, name, changes_width, attends):
    "Old names of the weights in a block, and in its attention if it has any."
    layers = ("norm_1", "conv_1", "norm_2.norm", "norm_2.proj", "conv_2")
    yield from both(*(f"{name}.block.{layer}" for layer in layers))
    if changes_width: yield from both(f"{name}.block.shortcut")
    if not attends: return
    layers = ("norm", "attention.to_qkv", "attention.to_out")
    yield from both(*(f"{name}.attention.{layer}" for layer in layers))
    if not config.feed_forward: return
    layers = ("0", "1.conv_1", "1.conv_2")
    yield from both(*(f"{name}.attention.feed_forward.{layer}" for layer in layers))


def old_way_down(config):
    "Old names of the weights on the way down."
    widths = [config.base_channels*m for m in config.channel_multipliers]
    channels, number = config.base_channels, 0
    for level, width in enumerate(widths):
        attends = config.resolutions[level] in config.attention_resolutions
        for _ in range(config.num_res_blocks):
            yield from old_stage(config, f"down.{number}", channels != width, attends)
            channels, number = width, number + 1
        if level + 1 < len(widths):
            yield from both(f"down.{number}")
            number += 1


def old_way_up(config):
    "Old names of the weights on the way up."
    blocks = config.num_res_blocks if config.mirrored else config.num_res_blocks + 1
    number = 0
    for level in reversed(range(len(config.channel_multipliers))):
        attends = config.resolutions[level] in config.attention_resolutions
        for _ in range(blocks):
            # a block gets a skip connection beside its input, so the width always changes
            yield from old_stage(config, f"up.{number}", True, attends)
            number += 1
        if level:
            yield from both(f"up.{number}")
            number += 1


def old_names(config):
    """The names of the weights in version 0.7, in the order of its `parameters()`.

    Its optimizer counts them in this order.
    """
    yield from both("time_embedding.linear_1", "time_embedding.linear_2")
    if config.num_classes: yield "class_embedding.weight"
    yield from both("conv_in")
    yield from old_way_down(config)
    yield from old_stage(config, "middle.0", False, True)
    yield from old_stage(config, "middle.1", False, False)
    yield from old_way_up(config)
    yield from both("norm_out", "conv_out")


@pytest.mark.parametrize("name", OLD)
def test_weights_with_old_names_are_loaded(name):
    """Each weight goes where it belongs, and the dictionary stays as it is.

    A copy of the model and a wrapped model load them too. Weights that are left over are refused.
    """
    config = OLD[name]
    model, (x, t, labels) = randomised(UNet(config)), inputs(config)
    labels = labels if config.num_classes else None
    names, weights = [*old_names(config)], [weight.detach().clone() for weight in model.parameters()]
    old = dict(zip(names, weights, strict=True))
    out = model(x.float(), t, labels)
    assert out.std() > 0.01
    for other in (UNet(config), copy.deepcopy(UNet(config))):
        assert other.load_state_dict(old, strict=True) == ([], []) and [*old] == names
        for found, wanted in zip(other.parameters(), weights, strict=True): assert torch.equal(found, wanted)
        assert torch.equal(other.eval()(x.float(), t, labels), out)
        assert other.load_state_dict(model.state_dict(), strict=True) == ([], [])
    wrapped = torch.nn.Sequential(UNet(config))
    wrapped_names = {f"0.{key}": weight for key, weight in old.items()}
    assert wrapped.load_state_dict(wrapped_names, strict=True) == ([], [])
    del old["middle.0.block.conv_1.weight"]
    with pytest.raises(RuntimeError, match="middle.blocks.0.residual.conv_1.weight"):
        UNet(config).load_state_dict(old)
    old["middle.2.block.conv_1.weight"] = weights[0]
    with pytest.raises(RuntimeError, match="middle.2.block.conv_1.weight"):
        UNet(config).load_state_dict(old)


def test_the_weights_of_the_package_have_old_names():
    "Version 0.7 saved them: the names above are those in its file."
    stored = load_weights(PRETRAINED["small"])
    assert set(stored["ema"]) == {*old_names(stored["config"].model)}
    model = UNet(stored["config"].model)
    assert model.load_state_dict(stored["ema"], strict=True) == ([], [])
    for name, weight in zip(old_names(model.config), model.parameters(), strict=True):
        assert torch.equal(weight, stored["ema"][name])


@pytest.mark.parametrize("name, total, of_squares", SUMS)
def test_what_a_seed_draws(name, total, of_squares):
    """The order in which the layers are made decides what a seed draws. It has not changed since version 0.7.

    The numbers are sums over all weights, from 0.7.
    """
    torch.manual_seed(0)
    weights = torch.cat([weight.detach().double().flatten() for weight in UNet(OLD[name]).parameters()])
    waves = torch.arange(len(weights), dtype=torch.float64).cos()    # so that places count, not only values
    found = torch.stack([(weights*waves).sum(), weights.square().sum()])
    assert_close(found, torch.tensor([total, of_squares], dtype=torch.float64), rtol=1e-5, atol=1e-4)


def saved_and_gradient(model, inputs):
    "Bytes that the forward pass keeps, the answer, and the gradient of a sum of it."
    model.zero_grad()
    found = []
    kept = saved_bytes(model, lambda: found.append(model(*inputs)))
    found[0].square().sum().backward()
    return kept, found[0].detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["self", "linear"])
def test_checkpointed_activations(name):
    "The same weights, answer and gradient as without, from less than half of the memory."
    config = UNetConfig(image_size=32, base_channels=32, channel_multipliers=(1, 2, 2), num_res_blocks=2,
                        attention_resolutions=(16,), attention=name)
    plain = randomised(UNet(config)).requires_grad_()
    twice = UNet(replace(config, checkpoint_activations=True))
    assert list(plain.state_dict()) == list(twice.state_dict())
    twice.load_state_dict(plain.state_dict())
    inputs = draw(3, 1, 32, 32).float(), torch.arange(3), torch.arange(3)
    (kept, answer, gradient), (kept_twice, same_answer, same_gradient) = (
        saved_and_gradient(model, inputs) for model in (plain, twice))
    assert kept_twice < kept/2 and torch.equal(answer, same_answer)
    for one, other in zip(gradient, same_gradient): assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_blocks_are_computed_twice_in_training_only():
    config = UNetConfig(image_size=8, base_channels=32, channel_multipliers=(1,), checkpoint_activations=True)
    model, calls = UNet(config), []
    model.middle.blocks[0].residual.register_forward_hook(lambda *_: calls.append(0))
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    model(x, t).sum().backward()
    assert len(calls) == 2
    with torch.no_grad(): model(x, t)
    assert len(calls) == 3


# --- a context ---

ASKING = UNetConfig(image_size=16, in_channels=3, num_classes=0, base_channels=16, channel_multipliers=(1, 2),
                    attention_resolutions=(8, 16), head_dim=8, num_groups=4, context_dim=12)


def contexts(n=3, m=5, width=12):
    "Vectors of words, and a mask: one word in the first text, two in the next, and so on."
    return draw(n, m, width, seed=5), torch.arange(m) <= torch.arange(n)[:, None]


def asking(config=ASKING):
    "A network with random weights in float64, noisy images and times."
    x, t, _ = inputs(config)
    return double(randomised(UNet(config))), x, t


def test_padding_never_changes_the_output():
    "To the last bit, whatever stands in it. Leaving it out, or making it longer, changes nothing either."
    (model, x, t), (context, mask) = asking(), contexts()
    out = model(x, t, context=context, context_mask=mask)
    spoilt = torch.where(mask[..., None], context, 1e50*context)
    assert torch.equal(model(x, t, context=spoilt, context_mask=mask), out)
    longer, its_mask = torch.cat([context, draw(3, 4, 12)], dim=1), F.pad(mask, (0, 4))
    assert_close(model(x, t, context=longer, context_mask=its_mask), out, rtol=0, atol=1e-10)
    for i in range(3):
        alone = model(x[i:i + 1], t[i:i + 1], context=context[i:i + 1, mask[i]])
        assert_close(alone, out[i:i + 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [
    ASKING, replace(ASKING, attention_resolutions=()), replace(ASKING, attention="linear", patch_size=2,
                                                               attention_resolutions=(4,), mirrored=False)],
    ids=["every level", "the middle alone", "linear, in patches"])
def test_the_context_reaches_the_output(config):
    "Every word reaches every pixel of its own image, and no other image."
    (model, x, t), (context, mask) = asking(config), contexts()
    context.requires_grad_()
    model(x, t, context=context, context_mask=mask)[1, 0, -1, -1].backward()
    reached = context.grad.abs().sum(dim=2) > 0
    assert reached[1].tolist() == [True, True, False, False, False] and not reached[[0, 2]].any()
    other = context.detach().clone()
    other[1, 0] += 1
    change = model(x, t, context=other, context_mask=mask) - model(x, t, context=context, context_mask=mask)
    assert (change[1].abs() > 1e-9).all() and not change[[0, 2]].any()


def test_a_context_is_never_ignored_or_missing():
    "Both are refused in one line that says what is needed. A network may take classes and a context."
    (model, x, t), (context, mask) = asking(), contexts()
    with pytest.raises(ValueError, match=r"it needs a context, \(B, M, 12\)"): model(x, t)
    without = UNet(replace(ASKING, context_dim=0))
    with pytest.raises(ValueError, match="no cross-attention"): without(x.float(), t, None, context, mask)
    with pytest.raises(ValueError, match="context_dim must be at least 0"): replace(ASKING, context_dim=-1)
    both, x, t = asking(replace(ASKING, num_classes=3))
    def answer(labels, scale): return both(x, t, labels, scale*context, mask)
    labels = torch.tensor([0, 1, 3])
    assert (answer(labels, 1) - answer(labels, 2)).abs().max() > 1e-3
    assert (answer(labels, 1) - answer((labels + 1) % 4, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [True, False])
def test_checkpointed_activations_with_a_context(masked):
    "The same answer and gradient as without, for every weight and for the context, from less memory."
    plain, (context, mask) = randomised(UNet(ASKING)).requires_grad_(), contexts()
    twice = UNet(replace(ASKING, checkpoint_activations=True))
    twice.load_state_dict(plain.state_dict())
    x, t, _ = inputs(ASKING)
    found = []
    for model in (plain, twice):
        words = context.float().requires_grad_()
        given = x.float(), t, None, words, mask if masked else None
        found.append((*saved_and_gradient(model, given), words.grad))
    (kept, answer, gradient, of_words), (kept_twice, same, same_gradient, same_of_words) = found
    assert kept_twice < kept/2 and torch.equal(answer, same)
    assert all(part.any() for part in gradient) and of_words[mask].abs().sum() > 0
    for one, other in zip([*gradient, of_words], [*same_gradient, same_of_words]):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OLD)
def test_a_context_only_adds_weights(name):
    """Without one there are the weights of before.

    They load into a network with one, which answers the same to the last bit until it has learned to ask.
    """
    config = OLD[name]
    plain, asks = randomised(UNet(config)), randomised(UNet(replace(config, context_dim=12)), seed=1)
    names = [key for key in asks.state_dict() if ".cross." not in key and ".cross_norm." not in key]
    assert list(plain.state_dict()) == names and len(names) < len(asks.state_dict())
    missing, unexpected = asks.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and len(missing) == len(asks.state_dict()) - len(names)
    for layer in asks.modules():
        if isinstance(layer, CrossAttention): zero_init(layer.to_out)
    x, t, labels = inputs(config)
    given = x.float(), t, labels if config.num_classes else None
    context, mask = contexts()
    assert torch.equal(plain(*given), asks(*given, context.float(), mask))
