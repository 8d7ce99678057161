"""diffusers, another implementation of the same papers, set up to do what our code does."""
from fractions import Fraction

import reference
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import nn
from torch.nn import functional as F

from ddpm_tutorial.unet import Block, Downsample, UNet, Upsample


def randomised(model, seed=0):
    """Random numbers in every parameter.

    Some layers start with zeros. With those, any two networks would agree, and the comparison would test
    nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # vectors (biases, norms): standard deviation 0.5
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
    for layer in model.modules():
        # an embedding picks a row, it does not sum over rows
        if isinstance(layer, nn.Embedding): nn.init.normal_(layer.weight, generator=generator)
    return model.eval().requires_grad_(False)


def double(ours):
    """Our U-Net in float64.

    The waves of the time embedding are float32 by design (in diffusers too), so we cast them.
    """
    def cast(layer, inputs): return (inputs[0].double(),)
    ours.time_embedding.linear_1.register_forward_pre_hook(cast)
    return ours.double()


def betas_of(schedule, T):
    "The settings of diffusers for our betas."
    name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule]
    return dict(beta_start=1e-4*1000/T, beta_end=0.02*1000/T, beta_schedule=name)


def exact_products(schedule, T):
    return torch.cumprod(1 - torch.tensor(reference.betas(schedule, T), dtype=torch.float64), dim=0)


def diffusers_scheduler(schedule, T, exact=False, **settings):
    "Its betas are float32. `exact` replaces only its table of cumulative products by a float64 one."
    theirs = DDPMScheduler(T, clip_sample=False, **betas_of(schedule, T), **settings)
    if exact: theirs.alphas_cumprod = exact_products(schedule, T)
    return theirs


def diffusers_ddim(schedule, T, clip, **settings):
    "The DDIM scheduler of diffusers, with a float64 table."
    theirs = DDIMScheduler(T, clip_sample=clip, set_alpha_to_one=True, **betas_of(schedule, T), **settings)
    theirs.alphas_cumprod = exact_products(schedule, T)
    return theirs


def ddim_step(theirs, output, t, prev_t, x, eta, noise):
    """A step of diffusers from t to prev_t.

    It takes `t - T//n` for the previous time. The n that is set here makes that our prev_t. By default it
    would keep the noise that belongs to the unclipped x0.
    """
    theirs.num_inference_steps = Fraction(theirs.config.num_train_timesteps, t - prev_t)
    return theirs.step(output, t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise)


def diffusers_dpm_solver(schedule, T, times, **settings):
    "DPM-Solver++(2M) at these times, with noise levels in float64. Its steps still convert x to float32."
    theirs = DPMSolverMultistepScheduler(
        T, solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
        lower_order_final=True, lambda_min_clipped=-float("inf"), thresholding=False,
        **{"algorithm_type": "dpmsolver++", **betas_of(schedule, T), **settings})
    theirs.set_timesteps(timesteps=times)
    a = exact_products(schedule, T)[times]
    theirs.sigmas = torch.cat([((1 - a)/a).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return theirs


def unet_settings(config):
    "The settings that are the same for every U-Net of diffusers here."
    return dict(
        attention_head_dim=config.head_dim, norm_num_groups=config.num_groups,
        attn_norm_num_groups=config.num_groups, norm_eps=1e-5, resnet_time_scale_shift="scale_shift",
        flip_sin_to_cos=True, freq_shift=0,             # cosines first, frequencies as ours
        num_class_embeds=config.num_classes + 1 if config.num_classes else None)      # and the null label


def forget(module):
    "Fills every parameter with NaN: if we forget to load one, the comparison fails."
    for parameter in module.parameters(): nn.init.constant_(parameter, torch.nan)


def load(pairs):
    "Copies the weights of ours into the layers of diffusers."
    for mine, its in pairs: its.load_state_dict(mine if isinstance(mine, dict) else mine.state_dict())


def diffusers_unet(ours: UNet) -> UNet2DModel:
    """A U-Net of diffusers with the settings and the weights of ours.

    It has no feed-forward, no patches, no odd sizes.
    """
    config = ours.config
    assert not config.feed_forward and config.attention == "self"
    attends = [size in config.attention_resolutions for size in config.resolutions]
    channels = config.in_channels * config.patch_size**2
    theirs = UNet2DModel(
        sample_size=config.resolutions[0], in_channels=channels, out_channels=channels,
        block_out_channels=[config.base_channels*m for m in config.channel_multipliers],
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        layers_per_block=config.num_res_blocks, downsample_padding=1, **unet_settings(config))
    forget(theirs)
    load(same_layers(ours, theirs))
    return theirs.eval().requires_grad_(False)


def diffusers_resnet(config, channels_in, channels_out):
    return ResnetBlock2D(in_channels=channels_in, out_channels=channels_out,
                         temb_channels=4*config.base_channels, groups=config.num_groups, eps=1e-5,
                         time_embedding_norm="scale_shift")


def diffusers_attention(config, channels, level):
    "Or None, if this level has no attention."
    if config.resolutions[level] not in config.attention_resolutions: return None
    return Attention(channels, heads=channels//config.head_dim, dim_head=config.head_dim, eps=1e-5,
                     norm_num_groups=config.num_groups, residual_connection=True, bias=True,
                     upcast_softmax=True, _from_deprecated_attn_block=True)


def way_down(config, widths):
    "Stages, each a pair (residual block, attention or None), and changes of size, on the way down."
    found, channels = [], config.base_channels
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            resnet = diffusers_resnet(config, channels, width)
            found.append((resnet, diffusers_attention(config, width, level)))
            channels = width
        if level + 1 < len(widths): found.append(Downsample2D(width, use_conv=True, padding=1))
    return found


def way_up(config, widths):
    "The same on the way up. Each stage gets the channels of the stage opposite as well."
    found, channels = [], widths[-1]
    for level in reversed(range(len(widths))):
        width = widths[level]
        for _ in range(config.num_res_blocks):
            resnet = diffusers_resnet(config, channels + width, width)
            found.append((resnet, diffusers_attention(config, width, level)))
            channels = width
        if level:
            channels = widths[level - 1]
            found.append(Upsample2D(width, use_conv=True, out_channels=channels))
    return found


def modules_in(sequence):
    "Every module in a sequence of stages and changes of size."
    for step in sequence:
        if isinstance(step, tuple): yield from (module for module in step if module is not None)
        else: yield step


def take_step(step, x, temb):
    "A stage or a change of size."
    if not isinstance(step, tuple): return step(x)
    resnet, attention = step
    x = resnet(x, temb)
    return x if attention is None else attention(x)


def mirrored_unet(ours: UNet):
    """A function of x, t and labels that predicts in float64: blocks of diffusers with our weights.

    It has no feed-forward and no patches, and its sizes halve.
    """
    config = ours.config
    assert config.mirrored and config.patch_size == 1 and not config.feed_forward
    widths = [config.base_channels*m for m in config.channel_multipliers]
    ends = UNet2DModel(                 # of this one we use everything but the ways down and up
        sample_size=config.image_size, in_channels=config.in_channels, out_channels=config.in_channels,
        block_out_channels=[widths[0], widths[-1]], down_block_types=["DownBlock2D"]*2,
        up_block_types=["UpBlock2D"]*2, layers_per_block=1, **unet_settings(config))
    down, up = way_down(config, widths), way_up(config, widths)
    for module in [ends, *modules_in(down + up)]:
        forget(module)
        module.double().eval().requires_grad_(False)
    load(same_ends(ours, ends))
    load(same_steps(ours, "down", layers(down)))
    load(same_steps(ours, "up", layers(up)))

    def forward(x, t, labels):
        temb = ends.time_embedding(ends.time_proj(t).double())
        if config.num_classes: temb = temb + ends.class_embedding(labels)
        x, kept = ends.conv_in(x), []
        for step in down:
            x = take_step(step, x, temb)
            if isinstance(step, tuple): kept.append(x)
        x = ends.mid_block(x, temb)
        for step in up:
            if isinstance(step, tuple): x = torch.cat([x, kept.pop()], dim=1)
            x = take_step(step, x, temb)
        assert not kept
        return ends.conv_out(F.silu(ends.conv_norm_out(x)))
    return forward


def layers(sequence):
    "As `same_steps` wants them: stages, and the convolutions of the changes of size."
    return [step if isinstance(step, tuple) else step.conv for step in sequence]


def same_ends(ours, theirs):
    """Pairs of layers that do the same, apart from the ways down and up.

    The first may be a state instead of a layer.
    """
    yield ours.time_embedding.linear_1, theirs.time_embedding.linear_1
    yield ours.time_embedding.linear_2, theirs.time_embedding.linear_2
    if ours.class_embedding is not None: yield ours.class_embedding, theirs.class_embedding
    yield ours.conv_in, theirs.conv_in
    (first, second), attention = theirs.mid_block.resnets, theirs.mid_block.attentions[0]
    yield from same_steps(ours, "middle", [(first, attention), (second, None)])
    yield ours.norm_out, theirs.conv_norm_out
    yield ours.conv_out, theirs.conv_out


def same_layers(ours, theirs):
    "Pairs of layers that do the same. The first may be a state instead of a layer."
    yield from same_ends(ours, theirs)
    down = [step for block in theirs.down_blocks for step in steps(block, block.downsamplers)]
    up = [step for block in theirs.up_blocks for step in steps(block, block.upsamplers)]
    yield from same_steps(ours, "down", down)
    yield from same_steps(ours, "up", up)


def steps(block, resizers):
    "The parts of a block of theirs: pairs (residual block, attention or None), perhaps a change of size."
    attentions = getattr(block, "attentions", [None]*len(block.resnets))
    return [*zip(block.resnets, attentions, strict=True), *(resizer.conv for resizer in resizers or [])]


def our_steps(ours, part):
    "The blocks and changes of size of a part (down, middle or up), in the order in which they run."
    kinds = (Block, Downsample, Upsample)
    return [layer for layer in getattr(ours, part).modules() if isinstance(layer, kinds)]


def same_steps(ours, part, its):
    "Pairs of layers that do the same, in two sequences of blocks and changes of size."
    for one, other in zip(our_steps(ours, part), its, strict=True):
        if not isinstance(one, Block):
            yield one, other
            continue
        (block, attention), (resnet, attn) = (one.residual, one.attention), other
        yield block.norm_1, resnet.norm1
        yield block.conv_1, resnet.conv1
        yield block.norm_2.proj, resnet.time_emb_proj
        yield block.norm_2.norm, resnet.norm2
        yield block.conv_2, resnet.conv2
        if not isinstance(block.shortcut, nn.Identity): yield block.shortcut, resnet.conv_shortcut
        if attn is None: continue
        yield attention.norm, attn.group_norm
        yield attention.attention.to_out, attn.to_out[0]
        qkv = attention.attention.to_qkv
        its_layers = (attn.to_q, attn.to_k, attn.to_v)
        for layer, weight, bias in zip(its_layers, qkv.weight.chunk(3), qkv.bias.chunk(3)):
            yield {"weight": weight, "bias": bias}, layer
