"""Bits per dimension: against known entropies, the formulas of the papers, and diffusers' variances."""
import math
from functools import partial

import pytest
import reference
import torch
from peers import DDPMScheduler
from torch.testing import assert_close

from ddpm_tutorial.data import load_sample, to_float, to_uint8
from ddpm_tutorial.likelihood import (
    bound_term,
    flow_bits,
    flow_log_density,
    gaussian_kl,
    hybrid_objective,
    log_probability_of_pixels,
    split_prediction,
    step_variance,
    variational_bound,
)
from ddpm_tutorial.objectives import ObjectiveConfig
from ddpm_tutorial.run.config import Config
from ddpm_tutorial.scheduler import NoiseScheduler, SchedulerConfig
from ddpm_tutorial.training import TrainConfig, diffusion_objective, new_state, random_generator, train_steps
from ddpm_tutorial.unet import UNet, UNetConfig

PATHS = {"linear": SchedulerConfig("linear", 500, "v_prediction"),
         "cosine": SchedulerConfig("cosine", 500, "epsilon"), "flow": SchedulerConfig("flow", 500, "flow"),
         "zero terminal SNR": SchedulerConfig("cosine", 500, "v_prediction", zero_terminal_snr=True)}
TWO_CHANNELS = UNetConfig(base_channels=32, channel_multipliers=(1, 1), patch_size=4, learned_variance=True)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def knows(scheduler, mean, std):
    "A model that knows the answer for N(mean, std^2) pixels."
    def model(x, t):
        signal, sigma = (factor.to(x) for factor in scheduler.factors(t, x))
        x0 = mean + std**2*signal/(std**2*signal**2 + sigma**2)*(x - signal*mean)
        return scheduler.target(x0, (x - signal*x0)/sigma, t)
    return model


def test_kl_against_torch():
    for mean, var_q, var_p in ((0.5, 0.3, 0.2), (0., 1., 2.), (3., 0.1, 0.1)):
        q, p = torch.distributions.Normal(0., var_q**0.5), torch.distributions.Normal(mean, var_p**0.5)
        found = gaussian_kl(torch.tensor(mean**2), torch.tensor(var_q), torch.tensor(var_p))
        assert_close(found, torch.distributions.kl_divergence(q, p))


@pytest.mark.parametrize("mean, std", [(0.2, 0.01), (-1.3, 0.3), (1.05, 1e-3), (0.999, 0.5)])
def test_probabilities_of_pixels_add_up(mean, std):
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    log_p = log_probability_of_pixels(levels, torch.full(levels.shape, mean), torch.tensor(std))
    assert_close(log_p.exp().sum().item(), 1., rtol=0, atol=1e-9)
    # by the midpoint rule, in the middle
    middle = levels[100:150]
    density = torch.distributions.Normal(mean, std).log_prob(to_float(middle)).double() + math.log(2/255)
    if std == 0.5: assert_close(log_p[100:150], density, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_bound_of_gaussian_pixels(path):
    """With the exact denoiser, the bound is not below the entropy of the pixels, and the flow hits it.

    The entropy of N(0.1, 0.2^2) in grey levels is that of the density plus log2(127.5). The straight path
    starts with less noise than a grey level, so that its Gaussian last step is too simple.
    """
    scheduler, generator = PATHS[path].build(), seeded()
    images = to_uint8(0.1 + 0.2*torch.randn(60, 1, 12, 12, generator=generator))
    entropy = math.log2(0.2*math.sqrt(2*math.pi*math.e)*127.5)
    # of these images, not of all
    nats = -torch.distributions.Normal(0.1, 0.2).log_prob(to_float(images)).mean().item()
    of_these = nats/math.log(2) + math.log2(127.5)
    assert abs(of_these - entropy) < 0.05
    model = knows(scheduler, 0.1, 0.2)
    bound = variational_bound(model, scheduler, images, generator=generator, num_times=60)
    flow = flow_bits(model, scheduler, images, generator=generator, num_inference_steps=100,
                     spacing="log_snr")
    assert bound.total.shape == flow.shape == (60,)
    assert of_these - 0.02 < flow.mean() < of_these + (0.3 if path == "flow" else 0.06)
    assert flow.mean() < bound.total.mean() < of_these + 3
    assert (bound.prior >= 0).all() and (bound.diffusion >= 0).all() and (bound.reconstruction >= 0).all()


def test_the_bound_is_one_bit_for_black_or_white():
    "Prior and diffusion alone find it; a narrow last step would cost nothing."
    scheduler, generator = SchedulerConfig("cosine", 1000, "sample").build(), seeded()
    images = 255*torch.randint(2, (60, 1, 12, 12), generator=generator).to(torch.uint8)
    def model(x, t):
        signal, sigma = (factor.to(x) for factor in scheduler.factors(t, x))
        return torch.tanh(signal*x/sigma**2)
    bound = variational_bound(model, scheduler, images, generator=generator, num_times=100)
    assert abs((bound.prior + bound.diffusion).mean().item() - 1) < 0.02


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_terms_are_half_the_fall_of_the_snr(variance_type):
    """For the small variance: `(SNR(t-1) - SNR(t)) |x0 - predicted|^2/2` (2107.00630, eq. 14).

    For the large one, the divergence of reference.py's two Gaussians.
    """
    T, generator = 50, seeded()
    scheduler = SchedulerConfig("linear", T, "sample", variance_type).build()
    x0, noise = to_float(load_sample().images[:8]), torch.randn(8, 1, 28, 28, generator=generator)
    guess = torch.randn(8, 1, 28, 28, generator=generator)
    betas = reference.betas("linear", T)
    for t in (1, 7, 49):
        found = bound_term(lambda x, t: guess, scheduler, x0, torch.full((8,), t), noise)
        error = (x0 - guess).double().square().flatten(1).mean(dim=1)
        snr = [a/(1 - a) for a in (reference.alpha_bar(betas, s) for s in (t - 1, t))]
        if variance_type == "fixed_small": nats = 0.5*(snr[0] - snr[1])*error
        else:
            of_x0, _, small, large = reference.posterior(betas, t, t - 1)
            nats = 0.5*(math.log(large/small) + (small + of_x0**2*error)/large - 1)
        assert_close(found, nats/math.log(2), rtol=2e-4, atol=1e-7)


def test_learned_variance_against_diffusers():
    "The same interpolation of logarithms as diffusers' `learned_range`, at every time from 1 on."
    scheduler = SchedulerConfig("linear", 1000).build()
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, variance_type="learned_range")
    raw = torch.tensor([-1., -0.3, 0., 0.8, 1.]).view(5, 1, 1, 1)
    for t in (1, 10, 500, 999):
        expected = theirs._get_variance(t, predicted_variance=raw)   # a logarithm
        ours = step_variance(scheduler, torch.full((5,), t), raw, (raw + 1)/2)
        assert_close(ours.log(), expected, rtol=1e-3, atol=1e-3)


def test_variance_of_the_last_step():
    "At t = 0 a fixed variance is the large one; a learned one reaches from the small one of t = 1 up to it."
    for variance_type in ("fixed_small", "fixed_large"):
        scheduler = SchedulerConfig("cosine", 100, "v_prediction", variance_type).build()
        like, t = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 99])
        fixed = step_variance(scheduler, t, like).flatten().double()
        assert_close(fixed[0], scheduler.sigma[0]**2, rtol=1e-6, atol=0)
        _, expected = scheduler.posterior(like, like, t)
        assert_close(fixed[1:], expected.flatten()[1:].double())
        low, high = (step_variance(scheduler, t, like, torch.full(like.shape, f))[:, 0, 0, 0]
                     for f in (0., 1.))
        small = SchedulerConfig("cosine", 100, "v_prediction").build().posterior(like, like, t)[1].flatten()
        assert_close(low, torch.stack([small[1], small[1], small[2]]), rtol=1e-4, atol=0)
        assert_close(high[0], fixed[0].float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_log_density_of_the_flow(path):
    "For Gaussian data in 9 dimensions, the log-density of noisy data at time 0 is known."
    scheduler = PATHS[path].build()
    a, b = scheduler.signal[0].item(), scheduler.sigma[0].item()
    normal = torch.randn(2, 10, 1, 3, 3, generator=seeded(), dtype=torch.float64)
    x = a*(0.3 + 0.5*normal[0]) + b*normal[1]
    found = flow_log_density(knows(scheduler, 0.3, 0.5), scheduler, x, generator=seeded(), spacing="log_snr",
                             num_inference_steps=200)
    known = torch.distributions.Normal(0.3*a, math.hypot(0.5*a, b)).log_prob(x).flatten(1).sum(dim=1)
    assert_close(found, known, rtol=0, atol=0.03)


def test_split_prediction():
    x, t = torch.zeros(2, 3, 4, 4), torch.zeros(2).long()
    prediction, fraction = split_prediction(lambda x, t: x + 1, x, t, {})
    assert (prediction == 1).all() and fraction is None
    prediction, fraction = split_prediction(lambda x, t: torch.cat([x + 1, x - 1], dim=1), x, t, {})
    assert (prediction == 1).all() and (fraction == 0).all()
    with pytest.raises(ValueError, match="or twice as many"):
        split_prediction(lambda x, t: x[:, :2], x, t, {})


def test_a_network_with_variance_draws_like_any_other():
    "Its forward pass gives the prediction alone, and the other channels only where they are asked for."
    torch.manual_seed(0)
    model = UNet(TWO_CHANNELS)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=0.1)
    x, cond = load_sample().batch(torch.arange(4), "cpu")
    t = torch.tensor([0, 5, 10, 49])
    both = model(x, t, with_variance=True, **cond)
    assert both.shape == (4, 2, 28, 28) and torch.equal(model(x, t, **cond), both[:, :1])


def test_the_hybrid_loss():
    """The simple loss plus the bound, which has a gradient for the variance alone.

    With the weight 0 it is the simple loss, and training with it brings the bound down.
    """
    torch.manual_seed(0)
    scheduler = NoiseScheduler.cosine(20, prediction_type="v_prediction")
    data = load_sample()[:64]
    x0, cond = data.batch(torch.arange(64), "cpu")
    config = TrainConfig(epochs=30, batch_size=64, lr=1e-2)
    state = new_state(UNet(TWO_CHANNELS), config)
    simple, _ = diffusion_objective(scheduler, 0.1)(state.model, x0, cond, random_generator(0))
    unbound = hybrid_objective(scheduler, 0.1, bound_weight=0.)
    without, level = unbound(state.model, x0, cond, random_generator(0))
    assert_close(without, simple)
    hybrid, _ = hybrid_objective(scheduler, 0.1)(state.model, x0, cond, random_generator(0))
    t = (level*20).round().long()
    noise = random_generator(0)
    torch.randint(20, (64,), generator=noise)
    noise = torch.randn(x0.shape, generator=noise)
    term = bound_term(partial(state.model, with_variance=True), scheduler, x0, t, noise)
    assert_close((hybrid - simple).double(), 0.001*20*term, rtol=1e-3, atol=1e-5)
    for _ in train_steps(state, data, hybrid_objective(scheduler, 0.), config): pass
    def bound(**kwargs):
        return variational_bound(partial(state.model, **kwargs), scheduler, data.images, generator=seeded(),
                                 labels=cond["labels"]).total.mean()
    assert bound(with_variance=True) < bound()


def test_far_from_the_prediction():
    """Many standard deviations away the probability is tiny, but right, and its gradient shows the way.

    The reference is the integral by the midpoint rule, in logarithms.
    """
    image = torch.full((1, 1, 1, 1), 100, dtype=torch.uint8)
    edges = torch.linspace(-1/255, 1/255, 20_001, dtype=torch.float64)
    places = 100/127.5 - 1 + (edges[1:] + edges[:-1])/2
    for distance, std in ((0.18, 0.02), (0.4, 0.02), (1.2, 0.03), (0.1, 1e-3)):
        mean = torch.tensor(100/127.5 - 1 + distance, dtype=torch.float64).view(1, 1, 1, 1)
        log_density = torch.distributions.Normal(mean.flatten(), std).log_prob(places)
        expected = torch.logsumexp(log_density, dim=0) + math.log(2/255/20_000)
        width = torch.tensor(std, dtype=torch.float64, requires_grad=True)
        found = log_probability_of_pixels(image, mean, width)
        assert_close(found.flatten()[0], expected, rtol=1e-4, atol=1e-4)
        slope, = torch.autograd.grad(found.sum(), width)
        assert slope > 0 and slope.isfinite()


def test_what_cannot_be_measured():
    scheduler, images = NoiseScheduler.cosine(20), load_sample().images[:2]
    def model(x, t): return x*0
    for number in (0, -3):
        with pytest.raises(ValueError, match="num_times must be at least 1"):
            variational_bound(model, scheduler, images, generator=seeded(), num_times=number)
    with pytest.raises(ValueError, match="num_inference_steps must be at least 2"):
        flow_log_density(model, scheduler, to_float(images), generator=seeded(), num_inference_steps=1)
    with pytest.raises(ValueError, match="build it with learned_variance=True"):
        UNet(UNetConfig(base_channels=32, channel_multipliers=(1, 1)))(
            to_float(images), torch.zeros(2), with_variance=True)
    with pytest.raises(ValueError, match="leave time_distribution uniform"):
        Config(model=UNetConfig(learned_variance=True), objective=ObjectiveConfig("lognormal"))


def test_times_are_drawn_where_the_terms_are():
    "Without signal at the end, few of the drawn times fall on the last one: the estimate stays narrow."
    scheduler, images = NoiseScheduler.flow(200), load_sample().images[:40]
    full, part = (variational_bound(lambda x, t: -x, scheduler, images, generator=seeded(),
                                    num_times=number).diffusion for number in (None, 20))
    assert (part - full).mean().abs() < 4*(part - full).std()/40**0.5
    assert (part - full).std() < 0.5*full.mean()
