"""Weights and times of training: against diffusers, closed forms, and the shapes that their papers give."""
import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch.testing import assert_close

from ddpm_tutorial.data import load_sample
from ddpm_tutorial.objectives import (
    LOSS_WEIGHTS,
    TIME_DISTRIBUTIONS,
    ObjectiveConfig,
    logit_normal_times,
    lognormal_times,
    min_snr_weight,
    x0_error_factor,
)
from ddpm_tutorial.scheduler import (
    PREDICTION_TYPES,
    NoiseScheduler,
    SchedulerConfig,
    flow_path,
    from_betas,
    linear_betas,
    shift_snr,
    zero_terminal_snr,
)
from ddpm_tutorial.training import TrainConfig, diffusion_objective, new_state, random_generator, train_steps
from ddpm_tutorial.unet import UNet, UNetConfig

ALL = torch.arange(1000)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def diffusers_snr():
    "The SNR of the linear schedule, by diffusers."
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    return compute_snr(theirs, ALL).double()


def test_snr_against_diffusers():
    assert_close(NoiseScheduler.linear().snr(ALL), diffusers_snr(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_against_the_training_script_of_diffusers(prediction_type):
    """Its text-to-image script divides min(SNR, gamma) by SNR, or by SNR + 1 for the velocity."""
    snr = diffusers_snr()
    smaller = torch.stack([snr, 5*torch.ones_like(snr)], dim=1).min(dim=1).values
    theirs = smaller/snr if prediction_type == "epsilon" else smaller/(snr + 1)
    ours = min_snr_weight(NoiseScheduler.linear(prediction_type=prediction_type), ALL)
    assert_close(ours, theirs, rtol=3e-3, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_error_of_x0(schedule, prediction_type):
    "If the network is off by a little, x0 is off by the square root of the factor times as much."
    scheduler = SchedulerConfig(schedule, 50, "v_prediction").build()
    scheduler = NoiseScheduler(scheduler.signal[:-1], scheduler.sigma[:-1], prediction_type=prediction_type)
    t = torch.arange(49)
    x0, noise = torch.randn(2, 49, 1, dtype=torch.float64, generator=seeded())
    x_t = scheduler.add_noise(x0, noise, t)
    found, _ = scheduler.to_x0_and_noise(scheduler.target(x0, noise, t) + 1e-3, x_t, t)
    assert_close((found - x0).squeeze()**2, 1e-6*x0_error_factor(scheduler, t), rtol=1e-6, atol=0)


def test_logit_normal_times_against_diffusers():
    "The quantiles of our times are those of diffusers' densities."
    for mean, std in ((0., 1.), (-0.5, 0.7)):
        torch.manual_seed(0)
        theirs = compute_density_for_timestep_sampling("logit_normal", 100_000, mean, std)
        ours = logit_normal_times(NoiseScheduler.flow(1000), 100_000, seeded(), mean, std)
        quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
        assert_close(((ours + 0.5)/1000).float().quantile(quantiles), theirs.quantile(quantiles),
                     rtol=0, atol=0.006)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_lognormal_times(schedule):
    "The logarithm of noise over signal is normal, as far as the path reaches."
    scheduler = SchedulerConfig(schedule, 4000, "v_prediction").build()
    t = lognormal_times(scheduler, 100_000, seeded())
    levels = (scheduler.sigma/scheduler.signal).log()[t]
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 4000
    normal = torch.distributions.Normal(-1.2, 1.2)
    for share in (0.1, 0.5, 0.9):
        assert abs(levels.quantile(share).item() - normal.icdf(torch.tensor(share)).item()) < 0.03


@pytest.mark.parametrize("name", TIME_DISTRIBUTIONS)
def test_times_are_those_of_the_generator(name):
    "Whole times of the schedule, the same for a seed, and others for another seed."
    draw, scheduler = TIME_DISTRIBUTIONS[name], NoiseScheduler.cosine(200)
    one, same, other = (draw(scheduler, 64, seeded(seed)) for seed in (1, 1, 2))
    assert one.dtype == torch.int64 and one.shape == (64,) and torch.equal(one, same)
    assert not torch.equal(one, other) and one.min() >= 0 and one.max() < 200
    assert draw(NoiseScheduler.cosine(1), 8, seeded()).tolist() == [0]*8


def test_the_default_is_the_loss_of_version_1():
    "No weight, uniform times: the same numbers as `diffusion_objective` without options."
    scheduler = NoiseScheduler.cosine(50)
    model = UNet(UNetConfig(base_channels=32, channel_multipliers=(1, 1)))
    x0, cond = load_sample().batch(torch.arange(8), "cpu")
    found = [objective(model, x0, cond, random_generator(3))
             for objective in (ObjectiveConfig().build(scheduler, 0.1), diffusion_objective(scheduler, 0.1))]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_mean_and_spread_of_the_times():
    "They reach the distribution: a higher mean gives noisier times, a smaller spread keeps them together."
    scheduler, x0 = NoiseScheduler.cosine(1000), torch.zeros(4000, 1, 8, 8)
    def levels(**options):
        objective = ObjectiveConfig("lognormal", **options).build(scheduler, 0.1)
        return objective(lambda x, t: x, x0, {}, random_generator(0))[1]
    middle, noisier, narrow = levels(), levels(time_mean=0.), levels(time_mean=0., time_std=0.1)
    assert noisier.mean() > middle.mean() + 0.1 and narrow.std() < 0.2*noisier.std()
    # a ratio of 1 is half-way on the cosine path
    assert abs(narrow.mean().item() - 0.5) < 0.01


def test_a_weight_multiplies_each_loss():
    scheduler = NoiseScheduler.cosine(50)
    model = UNet(UNetConfig(base_channels=32, channel_multipliers=(1, 1)))
    x0, cond = load_sample().batch(torch.arange(32), "cpu")
    plain, level = ObjectiveConfig().build(scheduler, 0.1)(model, x0, cond, random_generator(3))
    config = ObjectiveConfig(loss_weight="min_snr", min_snr_gamma=2.)
    weighted, _ = config.build(scheduler, 0.1)(model, x0, cond, random_generator(3))
    weight = min_snr_weight(scheduler, (level*50).round().long(), gamma=2.)
    assert_close(weighted.double(), plain.double()*weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", LOSS_WEIGHTS)
@pytest.mark.parametrize("times", TIME_DISTRIBUTIONS)
def test_every_objective_trains(weight, times):
    torch.manual_seed(0)
    config = TrainConfig(epochs=2, batch_size=50, lr=1e-3)
    state = new_state(UNet(UNetConfig(base_channels=32, channel_multipliers=(1, 1), patch_size=4)), config)
    objective = ObjectiveConfig(times, loss_weight=weight).build(NoiseScheduler.cosine(50), 0.1)
    losses = [step.loss for step in train_steps(state, load_sample()[:100], objective, config)]
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("wrong, message", [
    (dict(time_distribution="normal"), "time_distribution must be one of"),
    (dict(loss_weight="snr"), "loss_weight must be one of"),
    (dict(time_mean=1.), "time_mean: uniform times have neither"),
    (dict(time_distribution="lognormal", time_std=0.), "time_std must be above 0"),
    (dict(time_distribution="logit_normal", time_mean=math.nan), "time_mean must be finite"),
    (dict(min_snr_gamma=2.), "only the loss_weight min_snr has one"),
    (dict(loss_weight="min_snr", min_snr_gamma=0.), "min_snr_gamma must be above 0"),
    (dict(loss_weight="min_snr", min_snr_gamma=math.inf), "min_snr_gamma must be above 0")])
def test_wrong_objectives(wrong, message):
    with pytest.raises(ValueError, match=message): ObjectiveConfig(**wrong)


def test_zero_terminal_snr_against_diffusers():
    "The rescaled betas of diffusers give our signal."
    theirs = rescale_zero_terminal_snr(linear_betas(1000))
    signal, sigma = zero_terminal_snr(*from_betas(linear_betas(1000)))
    assert_close(signal, (1 - theirs).cumprod(dim=0).sqrt(), rtol=1e-9, atol=1e-12)
    assert signal[-1] == 0 and sigma[-1] == 1


def test_zero_terminal_snr_refuses_the_noise():
    for prediction_type in PREDICTION_TYPES:
        if prediction_type == "epsilon":
            with pytest.raises(ValueError, match="x0 cannot be computed from noise alone"):
                SchedulerConfig("cosine", 100, prediction_type, zero_terminal_snr=True)
        else: SchedulerConfig("cosine", 100, prediction_type, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="zero_terminal_snr needs"):
        SchedulerConfig("flow", 100, "flow", zero_terminal_snr=True)


@pytest.mark.parametrize("shift", [0.5, 1., 3.])
def test_shift_against_diffusers(shift):
    "On the straight path our shift is that of diffusers' scheduler for flow matching."
    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    _, sigma = shift_snr(*flow_path(1000), shift)
    assert_close(sigma.flip(0).float(), theirs.sigmas.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_shift_moves_the_log_snr(schedule):
    "By -2 log(shift) at every time, and the variance stays 1 (2301.11093, section 3.1)."
    moved, scheduler = (SchedulerConfig(schedule, 100, shift=shift).build() for shift in (64/28, 1.))
    t = torch.arange(100)
    assert_close(moved.snr(t).log() - scheduler.snr(t).log(),
                 torch.full((100,), 2*math.log(28/64), dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert_close(moved.signal**2 + moved.sigma**2, torch.ones(100, dtype=torch.float64))
    for wrong in (0., -1., math.inf, math.nan):
        with pytest.raises(ValueError, match="shift must be in 0.001"):
            SchedulerConfig(schedule, 100, shift=wrong)
