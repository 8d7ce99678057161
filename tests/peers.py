"""diffusers, another implementation of the same papers, set up to do what ours does."""
from fractions import Fraction

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import nn
from torch.nn import functional as F

from ddpm_tutorial.unet import Block, Downsample, UNet, Upsample

import reference


def randomised(model, seed=0):
    "Random numbers in every parameter: where layers start with zeros, any two networks agree, and nothing is compared."
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4      # vectors (biases, norms): standard deviation 0.5
        nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding): nn.init.normal_(layer.weight, generator=generator)   # a row, not a sum over rows
    return model.eval().requires_grad_(False)


def double(ours):
    "Our U-Net in float64. The waves of the time embedding are float32 by design (in diffusers as well); they are cast."
    ours.time_embedding.linear_1.register_forward_pre_hook(lambda layer, inputs: (inputs[0].double(),))
    return ours.double()


def betas_of(schedule, T):
    "Its settings for our betas."
    return dict(beta_start=1e-4*1000/T, beta_end=0.02*1000/T, beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule])


def exact_products(schedule, T): return torch.cumprod(1 - torch.tensor(reference.betas(schedule, T), dtype=torch.float64), dim=0)


def diffusers_scheduler(schedule, T, exact=False, **settings):
    "Its betas are float32; `exact` replaces its table of cumulative products by a float64 one, and leaves the formulas alone."
    theirs = DDPMScheduler(T, clip_sample=False, **betas_of(schedule, T), **settings)
    if exact: theirs.alphas_cumprod = exact_products(schedule, T)
    return theirs


def diffusers_ddim(schedule, T, clip, **settings):
    "With a float64 table."
    theirs = DDIMScheduler(T, clip_sample=clip, set_alpha_to_one=True, **betas_of(schedule, T), **settings)
    theirs.alphas_cumprod = exact_products(schedule, T)
    return theirs


def ddim_step(theirs, output, t, prev_t, x, eta, noise):
    "It takes `t - T//n` for the previous time: this n makes it ours. By default it would keep the noise that belongs to the unclipped x0."
    theirs.num_inference_steps = Fraction(theirs.config.num_train_timesteps, t - prev_t)
    return theirs.step(output, t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise)


def diffusers_dpm_solver(schedule, T, times, **settings):
    "DPM-Solver++(2M) at these times, with noise levels in float64; its steps bring x to float32 all the same."
    theirs = DPMSolverMultistepScheduler(T, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
                                         lower_order_final=True, lambda_min_clipped=-float("inf"), thresholding=False,
                                         **betas_of(schedule, T), **settings)
    theirs.set_timesteps(timesteps=times)
    a = exact_products(schedule, T)[times]
    theirs.sigmas = torch.cat([((1 - a)/a).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return theirs


def diffusers_unet(ours: UNet) -> UNet2DModel:
    "A U-Net of diffusers with the settings and the weights of ours. It has no feed-forward, no patches and no odd sizes."
    config = ours.config
    assert not config.feed_forward and config.attention == "self"
    attends = [size in config.attention_resolutions for size in config.resolutions]
    channels = config.in_channels * config.patch_size**2
    theirs = UNet2DModel(
        sample_size=config.resolutions[0], in_channels=channels, out_channels=channels,
        block_out_channels=[config.base_channels*m for m in config.channel_multipliers],
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        layers_per_block=config.num_res_blocks, downsample_padding=1, attention_head_dim=config.head_dim,
        norm_num_groups=config.num_groups, attn_norm_num_groups=config.num_groups, norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift", flip_sin_to_cos=True, freq_shift=0,      # cosines first, frequencies as ours
        num_class_embeds=config.num_classes + 1 if config.num_classes else None)        # and the null label
    for parameter in theirs.parameters(): nn.init.constant_(parameter, torch.nan)       # one that is forgotten shows
    for mine, its in same_layers(ours, theirs): its.load_state_dict(mine if isinstance(mine, dict) else mine.state_dict())
    return theirs.eval().requires_grad_(False)


def mirrored_unet(ours: UNet):
    "x, t, labels -> prediction in float64: blocks of diffusers with the weights of ours, wired here. No feed-forward, no patches, sizes that halve."
    config = ours.config
    assert config.mirrored and config.patch_size == 1 and not config.feed_forward
    ends = UNet2DModel(sample_size=config.image_size, in_channels=config.in_channels, out_channels=config.in_channels, # of which we take what is not down or up
        block_out_channels=[config.base_channels*config.channel_multipliers[level] for level in (0, -1)], down_block_types=["DownBlock2D"]*2, up_block_types=["UpBlock2D"]*2,
        layers_per_block=1, attention_head_dim=config.head_dim, norm_num_groups=config.num_groups, attn_norm_num_groups=config.num_groups, norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift", flip_sin_to_cos=True, freq_shift=0, num_class_embeds=config.num_classes + 1 if config.num_classes else None)
    resnet = lambda i, o: ResnetBlock2D(in_channels=i, out_channels=o, temb_channels=4*config.base_channels, groups=config.num_groups, eps=1e-5, time_embedding_norm="scale_shift")
    attn = lambda c, attends: Attention(c, heads=c//config.head_dim, dim_head=config.head_dim, eps=1e-5, norm_num_groups=config.num_groups, residual_connection=True,
                                        bias=True, upcast_softmax=True, _from_deprecated_attn_block=True) if attends else None
    widths = [config.base_channels*m for m in config.channel_multipliers]
    attends = [size in config.attention_resolutions for size in config.resolutions]
    down, up, channels = [], [], config.base_channels
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks): down.append((resnet(channels, width), attn(channels := width, attends[level])))
        if level + 1 < len(widths): down.append(Downsample2D(width, use_conv=True, padding=1))
    for level in reversed(range(len(widths))):
        for i in range(config.num_res_blocks): up.append((resnet((channels if i == 0 else widths[level]) + widths[level], widths[level]), attn(widths[level], attends[level])))
        if level: up.append(Upsample2D(widths[level], use_conv=True, out_channels=(channels := widths[level - 1])))
    layers = lambda sequence: [step if isinstance(step, tuple) else step.conv for step in sequence]
    for part in nn.ModuleList([ends, *(module for step in down + up for module in (step if isinstance(step, tuple) else [step]) if module is not None)]):
        for parameter in part.parameters(): nn.init.constant_(parameter, torch.nan)          # one that is forgotten shows
        part.double().eval().requires_grad_(False)
    for mine, its in [*same_ends(ours, ends), *same_steps(ours, "down", layers(down)), *same_steps(ours, "up", layers(up))]:
        its.load_state_dict(mine if isinstance(mine, dict) else mine.state_dict())

    def forward(x, t, labels):
        temb = ends.time_embedding(ends.time_proj(t).double())
        if config.num_classes: temb = temb + ends.class_embedding(labels)
        stage = lambda step, x: step[0](x, temb) if step[1] is None else step[1](step[0](x, temb))
        x, kept = ends.conv_in(x), []
        for step in down:
            if isinstance(step, tuple): kept.append(x := stage(step, x))
            else: x = step(x)
        x = ends.mid_block(x, temb)
        for step in up: x = stage(step, torch.cat([x, kept.pop()], dim=1)) if isinstance(step, tuple) else step(x)
        assert not kept
        return ends.conv_out(F.silu(ends.conv_norm_out(x)))
    return forward


def same_ends(ours, theirs):
    "Pairs of layers (or of a state of ours and a layer of theirs) that do the same, before, between and after the ways down and up."
    yield ours.time_embedding.linear_1, theirs.time_embedding.linear_1
    yield ours.time_embedding.linear_2, theirs.time_embedding.linear_2
    if ours.class_embedding is not None: yield ours.class_embedding, theirs.class_embedding
    yield ours.conv_in, theirs.conv_in
    yield from same_steps(ours, "middle", [(theirs.mid_block.resnets[0], theirs.mid_block.attentions[0]), (theirs.mid_block.resnets[1], None)])
    yield ours.norm_out, theirs.conv_norm_out
    yield ours.conv_out, theirs.conv_out


def same_layers(ours, theirs):
    "Pairs of layers (or of a state of ours and a layer of theirs) that do the same."
    yield from same_ends(ours, theirs)
    yield from same_steps(ours, "down", [step for block in theirs.down_blocks for step in steps(block, block.downsamplers)])
    yield from same_steps(ours, "up", [step for block in theirs.up_blocks for step in steps(block, block.upsamplers)])


def steps(block, resizers):
    "What a block of theirs does, one after the other: (residual block, attention or None) ..., and perhaps a change of size."
    attentions = getattr(block, "attentions", [None]*len(block.resnets))
    return [*zip(block.resnets, attentions, strict=True), *(resizer.conv for resizer in resizers or [])]


def our_steps(ours, part):
    "The blocks and changes of size on the way down, in the middle or on the way up, in the order in which they run."
    return [layer for layer in getattr(ours, part).modules() if isinstance(layer, (Block, Downsample, Upsample))]


def same_steps(ours, part, its):
    "Pairs of layers in two sequences of blocks and changes of size."
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
        for layer, weight, bias in zip((attn.to_q, attn.to_k, attn.to_v), qkv.weight.chunk(3), qkv.bias.chunk(3)):
            yield {"weight": weight, "bias": bias}, layer
