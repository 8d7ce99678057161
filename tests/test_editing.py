"Editing: shorter paths, known parts, measurements, and what `ddpm_sample` does with a picture to begin with."
import itertools
import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from peers import randomised
from PIL import Image
from test_commands import command
from test_faults import one_error
from test_text_to_image import captioned, saved_autoencoder, unfitted
from torch import nn
from torch.testing import assert_close

from ddpm_tutorial.data import PIXELS, DataError, load_image, load_sample, to_float, without_labels
from ddpm_tutorial.editing import (
    add_last_noise,
    fit_measurement,
    keep_known,
    latent_mask,
    mix_noise,
    repaint_steps,
    shorten_path,
)
from ddpm_tutorial.fast_sampling import ddim_steps, dpm_solver_steps
from ddpm_tutorial.run import sample as command_sample
from ddpm_tutorial.run.checkpoint import load_model, save_weights
from ddpm_tutorial.run.conditions import load_codec, read_facts, text_conditions
from ddpm_tutorial.run.config import Config, ConfigError, SamplingConfig
from ddpm_tutorial.run.device import sampling_steps, steps_to_take
from ddpm_tutorial.run.sample import SampleOptions, read_start
from ddpm_tutorial.sampler import ddpm_steps, guided, predict_x0, sample
from ddpm_tutorial.scheduler import PREDICTION_TYPES, SPACINGS, SchedulerConfig
from ddpm_tutorial.solvers import METHODS, heun_steps
from ddpm_tutorial.unet import UNet, UNetConfig

PATHS = {"linear": SchedulerConfig("linear", 100),
         "cosine": SchedulerConfig("cosine", 100, "v_prediction"),
         "flow": SchedulerConfig("flow", 100, "flow"),
         "no signal": SchedulerConfig("cosine", 100, "sample", zero_terminal_snr=True)}
each_path = pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0): return torch.randn(shape, generator=seeded(seed))


def uniform(*shape, seed=0): return torch.rand(shape, generator=seeded(seed))


def lively(x, t):
    "A made-up model: its answers depend on place and time, and its x0 leaves [-1, 1]."
    return torch.sin(3*x + 0.05*t.view(-1, *[1]*(x.ndim - 1))) + 0.3*x


def gaussian(scheduler, covariance, mean=0.):
    "The best denoiser for vectors (B, d) of Gaussian numbers. Along each axis of the data it is a factor."
    lengths, axes = torch.linalg.eigh(covariance)
    def model(x, t):
        signal, sigma = (part.to(x) for part in scheduler.factors(t, x))
        Q, variance = axes.to(x), lengths.to(x)
        x0 = mean + (x - signal*mean) @ Q*(signal*variance/(signal**2*variance + sigma**2)) @ Q.T
        return scheduler.target(x0, scheduler.implied_noise(x0, x, t), t)
    return model


def recorded(model, calls):
    "The model, which adds its times and conditions to a list."
    def recording(x, t, **cond):
        calls.append((t.tolist(), {name: value.tolist() for name, value in cond.items()}))
        return model(x, t)
    return recording


# --- a shorter path -----------------------------------------------------------------------------------------

@each_path
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("strength, length", [(1e-9, 1), (0.004, 1), (0.02, 2), (0.3, 30), (0.576, 58),
                                              (0.999, 100), (1, 100), (1., 100)])
def test_a_short_path_is_the_clean_part(config, prediction_type, strength, length):
    "It has the same signal and noise at the times that are left, and with strength 1 these are all."
    if prediction_type == "epsilon" and config.build().signal[-1] == 0: prediction_type = "flow"
    path = replace(config, prediction_type=prediction_type, variance_type="fixed_large").build()
    short = shorten_path(path, strength)
    assert type(short) is type(path) and len(short) == length and len(path) == 100
    assert torch.equal(short.signal, path.signal[:length]) and torch.equal(short.sigma, path.sigma[:length])
    assert (short.prediction_type, short.variance_type) == (prediction_type, "fixed_large")


@pytest.mark.parametrize("strength", [0, -0.1, 1.0001, math.nan, math.inf, -math.inf])
def test_strengths_that_cannot_be(strength):
    with pytest.raises(ValueError, match=rf"strength must be in \(0, 1\], not {strength}"):
        shorten_path(PATHS["cosine"].build(), strength)


@each_method
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 5, 40])
def test_a_sampler_on_a_short_path_begins_at_its_end(method, spacing, n):
    "It never asks for a later time, and its step takes it from there to clean data."
    short, calls = shorten_path(PATHS["cosine"].build(), 0.4), []
    steps = list(method(recorded(lively, calls), short, (2, 1, 3, 3), generator=seeded(),
                        num_inference_steps=n, spacing=spacing))
    times = [t for call, _ in calls for t in call]
    assert len(steps) == n and steps[0].t == times[0] == max(times) == 39 and min(times) >= 0


@each_path
@pytest.mark.parametrize("strength", [0.05, 0.5, 1.])
def test_noise_of_the_last_time(config, strength):
    "The images times the last signal plus the noise times the last sigma, so mean and variance are those."
    short = shorten_path(config.build(), strength)
    signal, sigma = short.signal[-1].float(), short.sigma[-1].float()
    x0, noise = uniform(3, 2, 100, 100)*2 - 1, normal(3, 2, 100, 100)
    found = add_last_noise(short, x0, noise)
    assert_close(found, signal*x0 + sigma*noise)
    assert_close((found - signal*x0).var(), sigma**2, rtol=0.03, atol=0)
    assert_close(add_last_noise(short, x0, noise*0), signal*x0)


@each_method
@pytest.mark.parametrize("config", [PATHS["linear"], PATHS["cosine"], PATHS["flow"]])
def test_almost_no_strength_is_almost_no_change(method, config):
    "One or two of a thousand times leave the start as it is, but for what the noise of these times allows."
    x0 = uniform(4, 1, 5, 5)*1.6 - 0.8
    for strength in (0.0001, 0.002):
        short = shorten_path(replace(config, num_steps=1000).build(), strength)
        found = sample(lively, short, x0.shape, generator=seeded(), method=method,
                       noise=add_last_noise(short, x0, normal(4, 1, 5, 5, seed=1)))
        assert 0 < (found - x0).abs().max() < 6*short.sigma[-1] < 0.2


# --- SDEdit against what follows from it --------------------------------------------------------------------

MEAN, VARIANCE, START = 0.5, 0.25, -1.     # of Gaussian data, and the picture that we begin with
EXACT = {"linear": SchedulerConfig("linear", 400), "flow": SchedulerConfig("flow", 400, "flow"),
         "cosine": SchedulerConfig("cosine", 400, "v_prediction")}


def edited(config, strength, method, starts):
    "Results for these draws of noise. Each number is a sample."
    short = shorten_path(config.build(), strength)
    x0 = torch.full_like(starts, START)
    return short, sample(gaussian(config.build(), torch.eye(1)*VARIANCE, MEAN), short, starts.shape,
                         generator=seeded(), method=method, clip_sample=False,
                         noise=add_last_noise(short, x0, starts)).double()


@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("strength", [0.3, 0.8])
@pytest.mark.parametrize("method", [ddim_steps, dpm_solver_steps, heun_steps])
def test_edits_without_fresh_noise_are_exact(config, strength, method):
    """The way from the noisy start keeps its place among all noisy data.

    Without fresh noise the sampler is a straight function of the start, so two starts tell mean and variance.
    """
    short, (at_zero, at_one) = edited(config, strength, method, torch.tensor([[0.], [1.]]))
    signal, sigma = short.signal[-1], short.sigma[-1]
    total = signal**2*VARIANCE + sigma**2
    mean = MEAN + (VARIANCE/total).sqrt()*signal*(START - MEAN)
    assert_close(at_zero.squeeze(), mean, rtol=0, atol=0.01)
    assert_close((at_one - at_zero).squeeze()**2, VARIANCE*sigma**2/total, rtol=0, atol=0.01)


@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("strength", [0.3, 0.7])
@pytest.mark.parametrize("method", [ddpm_steps, partial(ddim_steps, eta=1.),
                                    partial(dpm_solver_steps, eta=1.)], ids=["ddpm", "ddim", "dpm++"])
def test_edits_with_fresh_noise_are_exact(config, strength, method):
    "They draw from what the noisy start leaves open, so its mean and variance are known."
    short, found = edited(config, strength, method, normal(5000, 1, seed=1))
    signal, sigma = short.signal[-1], short.sigma[-1]
    total = signal**2*VARIANCE + sigma**2
    pull = signal*VARIANCE/total
    assert_close(found.mean(), MEAN + pull*signal*(START - MEAN), rtol=0, atol=0.02)
    assert_close(found.var(), VARIANCE*sigma**2/total + (pull*sigma)**2, rtol=0.08, atol=0)


# --- what is known stays ------------------------------------------------------------------------------------

def picture(seed=0): return uniform(4, 2, 5, 5, seed=seed)*1.8 - 0.9


def some(*shape, seed=0): return uniform(*shape, seed=seed) < 0.5


@each_path
def test_a_model_that_knows(config):
    "It sees what is known, and elsewhere what the model itself sees, at every time."
    path, known, mask, t = config.build(), picture(), some(4, 1, 5, 5, seed=1), torch.tensor([0, 20, 70, 99])
    x = normal(4, 2, 5, 5, seed=2).double()
    found, plain = (predict_x0(model, path, x, t, False, {}) for model in
                    (keep_known(lively, path, known, mask), lively))
    assert_close(found, torch.where(mask, known.double(), plain), rtol=1e-8, atol=1e-8)


@each_method
@each_path
def test_the_known_part_stays(config, method):
    "It is there in the result and the rest is new, also if the path is short."
    path, known, mask = config.build(), picture(), some(4, 1, 5, 5, seed=1).expand(4, 2, 5, 5)
    model = keep_known(lively, path, known, mask)
    for strength in (0.3, 1.):
        x = sample(model, shorten_path(path, strength), known.shape, generator=seeded(), method=method,
                   num_inference_steps=9)
        assert_close(x[mask], known[mask], rtol=0, atol=1e-5)
        assert (x - known)[~mask].abs().mean() > 0.1
        if config.prediction_type == "sample": assert (x - known)[mask].abs().max() < 1e-7


@each_method
@each_path
def test_with_nothing_known_it_is_the_model(config, method):
    path, t = config.build(), torch.tensor([0, 20, 70, 99])
    x, nothing = normal(4, 2, 5, 5).double(), torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    model = keep_known(lively, path, picture(), nothing)
    assert_close(model(x, t), lively(x, t), rtol=1e-8, atol=1e-8)
    one, other = (sample(m, path, x.shape, generator=seeded(), method=method, noise=x.float(),
                         num_inference_steps=9) for m in (model, lively))
    assert_close(one, other, rtol=1e-3, atol=1e-3)


def told(x, t, labels): return lively(x, t) + labels.view(-1, 1, 1, 1)/10


@each_method
def test_known_parts_and_guidance(method):
    "The guided model fills in the rest: labels and scale count there, and nothing changes what is known."
    path, known, mask = PATHS["cosine"].build(), picture(), some(1, 1, 5, 5)
    def drawn(scale, labels):
        model = keep_known(guided(told, scale, {"labels": 10}), path, known, mask)
        return sample(model, path, known.shape, generator=seeded(), method=method, num_inference_steps=9,
                      labels=labels)
    found = [drawn(2., torch.arange(4)), drawn(3., torch.arange(4)), drawn(2., torch.full((4,), 9))]
    inside = mask.expand(known.shape)
    for x in found: assert_close(x[inside], known[inside], rtol=0, atol=1e-5)
    for x, y in itertools.combinations(found, 2): assert (x - y)[~inside].abs().mean() > 0.01


def test_labels_reach_the_model_beneath():
    path, calls = PATHS["flow"].build(), []
    model = keep_known(recorded(lively, calls), path, picture(), some(1, 1, 5, 5))
    model(normal(4, 2, 5, 5), torch.arange(4), labels=torch.tensor([3, 1, 4, 1]))
    assert calls == [([0, 1, 2, 3], {"labels": [3, 1, 4, 1]})]


def test_one_known_picture_or_mask_serves_the_whole_batch():
    path, known, mask, t = PATHS["linear"].build(), picture()[:1], some(1, 1, 5, 5), torch.arange(4)*20
    x = normal(4, 2, 5, 5)
    found = keep_known(lively, path, known, mask)(x, t)
    whole = known.repeat(4, 1, 1, 1), mask.repeat(4, 2, 1, 1)
    assert torch.equal(found, keep_known(lively, path, *whole)(x, t)) and found.shape == x.shape


# --- RePaint ------------------------------------------------------------------------------------------------

@each_path
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("n", [1, 12, 100])
def test_repainting_once_is_ancestral_sampling(config, clip, n):
    "To the last bit, in every step, and it takes the same numbers out of the generator."
    runs, generators = [], (seeded(), seeded())
    for method, generator in zip((partial(repaint_steps, repeats=1), ddpm_steps), generators):
        runs.append(list(method(lively, config.build(), (3, 1, 4, 4), generator=generator, clip_sample=clip,
                                num_inference_steps=n)))
    for one, other in zip(*runs, strict=True):
        assert one.t == other.t and torch.equal(one.x, other.x) and torch.equal(one.x0, other.x0)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_repeats_bring_the_new_pixel_to_its_neighbour():
    """Two Gaussian pixels with correlation 0.8, of which the first is known to be a.

    With one pass the second hears only a part of it. With many its mean is 0.8 a, and it spreads less.
    """
    path, a = SchedulerConfig("cosine", 300).build(), -1.5
    exact = gaussian(path, torch.tensor([[1., 0.8], [0.8, 1.]]))
    model = keep_known(exact, path, torch.tensor([[a, 0.]]), torch.tensor([[True, False]]))
    means, spreads = [], []
    for repeats in (1, 4, 20):
        x = sample(model, path, (4000, 2), generator=seeded(), method=repaint_steps, repeats=repeats,
                   clip_sample=False, num_inference_steps=50)
        assert_close(x[:, 0], torch.full((4000,), a), rtol=0, atol=1e-5)
        means.append(x[:, 1].mean().item()/a)
        spreads.append(x[:, 1].std().item())
    assert means[0] < 0.6 < means[1] < 0.77 < means[2] == pytest.approx(0.8, abs=0.03)
    assert 0.45 < spreads[2] < spreads[1] < spreads[0] < 0.8


@each_path
@pytest.mark.parametrize("repeats", [2, 5])
def test_each_step_has_the_noise_of_its_time(config, repeats):
    "If the model knows the picture, mean and variance after each step are those of the path."
    path = replace(config, prediction_type="sample").build()
    def knows(x, t): return torch.full_like(x, 0.7)
    steps = list(repaint_steps(knows, path, (20_000, 1), generator=seeded(), repeats=repeats,
                               num_inference_steps=6))
    for step, later in zip(steps, steps[1:]):
        signal, sigma = path.signal[later.t].float(), path.sigma[later.t].float()
        assert_close(step.x.mean(), 0.7*signal, rtol=0, atol=0.03)
        assert_close(step.x.std(), sigma, rtol=0.03, atol=0)
    assert_close(steps[-1].x, torch.full((20_000, 1), 0.7))


@pytest.mark.parametrize("n, repeats", [(1, 5), (6, 1), (6, 3), (20, 4)])
def test_how_often_the_model_is_asked_and_what_it_is_told(n, repeats):
    "Each step is taken several times with the same labels, and the last one once."
    path, calls, labels = PATHS["cosine"].build(), [], torch.tensor([3, 1, 4])
    run = list(repaint_steps(recorded(lively, calls), path, (3, 1, 4, 4), generator=seeded(), repeats=repeats,
                             num_inference_steps=n, labels=labels))
    times = [t for t, _ in path.timesteps(n)]
    wanted = [t for t in times[:-1] for _ in range(repeats)] + times[-1:]
    assert len(calls) == (n - 1)*repeats + 1 and [step.t for step in run] == times
    assert calls == [([t]*3, {"labels": [3, 1, 4]}) for t in wanted]


def test_other_options_stay_out_of_the_conditions():
    "Start, spacing and the like go to the sampler, not to the model."
    calls = []
    options = dict(noise=normal(2, 1, 4, 4), spacing="log_snr", skip_zero=True, device="cpu")
    list(repaint_steps(recorded(lively, calls), PATHS["cosine"].build(), (2, 1, 4, 4), generator=seeded(),
                       repeats=3, num_inference_steps=4, **options))
    assert len(calls) == 10 and all(cond == {} for _, cond in calls)


@pytest.mark.parametrize("repeats", [0, -1])
def test_no_repeat_at_all_is_refused(repeats):
    "At once, not at the first step."
    with pytest.raises(ValueError, match=f"repeats must be at least 1, not {repeats}"):
        repaint_steps(lively, PATHS["cosine"].build(), (2, 1, 4, 4), generator=seeded(), repeats=repeats)


def test_predictions_are_clipped_in_the_repeats():
    "A model that sees 5 everywhere then is one that sees 1. Without clipping it is not."
    def drawn(value, clip):
        return list(repaint_steps(lambda x, t: torch.full_like(x, value), PATHS["no signal"].build(),
                                  (2, 1, 4, 4), generator=seeded(), repeats=3, clip_sample=clip,
                                  num_inference_steps=5))
    for step, other in zip(drawn(5., True), drawn(1., True)): assert torch.equal(step.x, other.x)
    for step, other in zip(drawn(5., False), drawn(1., True)): assert step.x.mean() > other.x.mean() + 0.1


@each_path
def test_repeats_keep_what_is_known(config):
    path, known, mask = config.build(), picture(), some(1, 1, 5, 5).expand(4, 2, 5, 5)
    x = sample(keep_known(lively, path, known, mask), path, known.shape, generator=seeded(),
               method=repaint_steps, repeats=3, num_inference_steps=9)
    assert_close(x[mask], known[mask], rtol=0, atol=1e-5)
    assert (x - known)[~mask].abs().mean() > 0.1


# --- masks of latents ---------------------------------------------------------------------------------------

def test_masks_of_latents_by_hand():
    "With a factor of 2, on 8 by 8 pixels. A position whose own pixels or neighbours are missing is unknown."
    def known(*missing, shape=(1, 1, 8, 8), value=False):
        mask = torch.full(shape, not value)
        for place in missing: mask[..., place[0], place[1]] = value
        return latent_mask(mask, 2)[0, 0].int().tolist()
    assert known() == [[1]*4]*4 and known(value=True) == [[0]*4]*4
    assert known((0, 0)) == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert known((2, 5)) == known((3, 4)) == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert known((slice(None), slice(5))) == [[0, 0, 0, 0]]*4 and known((slice(None), 0)) == [[0, 0, 1, 1]]*4


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.002, 0.02])
def test_masks_of_latents_by_counting(factor, share):
    "A position is known if all pixels of its square are, and those up to its own width around it."
    mask = uniform(3, 1, 32, 48) > share
    mask[0] = True
    found = latent_mask(mask, factor)
    assert found.dtype == torch.bool and found.shape == (3, 1, 32//factor, 48//factor) and found[0].all()
    for b, i, j in itertools.product(range(3), range(32//factor), range(48//factor)):
        rows, columns = (slice(max(0, (k - 1)*factor), (k + 2)*factor) for k in (i, j))
        assert found[b, 0, i, j] == mask[b, 0, rows, columns].all()


# --- mixtures of noise --------------------------------------------------------------------------------------

def test_mixed_noise_goes_along_the_arc():
    "Both ends are the draws themselves, each mixture has variance 1, and equal shares are equal angles."
    a, b = normal(2, 1, 1, 200, 200).unbind()
    assert_close(mix_noise(a, b, 0), a)
    assert_close(mix_noise(a, b, 1), b)
    one, zero = torch.ones(1), torch.zeros(1)
    for share in (0.1, 0.25, 0.5, 1/3, 0.9):
        first, second = mix_noise(one, zero, share), mix_noise(zero, one, share)
        assert_close(torch.atan2(second, first), torch.tensor([share*math.pi/2]))
        assert_close(first**2 + second**2, one)
        mixed = mix_noise(a, b, share)
        assert_close(mixed, first*a + second*b)
        assert mixed.var().item() == pytest.approx(1, abs=0.03)
        assert mixed.shape == a.shape and mixed.dtype == a.dtype


# --- what was measured --------------------------------------------------------------------------------------

ROWS, MEASURED = torch.linalg.qr(normal(6, 6, seed=3))[0][:2], torch.tensor([[1.5, -1.]])
MEASURABLE = {"linear": SchedulerConfig("linear", 300), "v": SchedulerConfig("linear", 300, "v_prediction"),
              "cosine": SchedulerConfig("cosine", 300, "sample"),
              "flow": SchedulerConfig("cosine", 300, "flow")}
STRAIGHT = SchedulerConfig("flow", 300, "flow")
each_measurable = pytest.mark.parametrize("config", MEASURABLE.values(), ids=MEASURABLE)


def rows_of(x): return x @ ROWS.to(x).T


def fitting(path, noise_std, covariance=torch.eye(6), measured=MEASURED):
    return fit_measurement(gaussian(path, covariance), path, rows_of, measured, noise_std)


def posterior(noise_std):
    "Mean and covariance of white noise of which two rows were measured."
    return (MEASURED @ ROWS)[0]/(1 + noise_std**2), torch.eye(6) - ROWS.T @ ROWS/(1 + noise_std**2)


@pytest.mark.parametrize("config", [*MEASURABLE.values(), STRAIGHT], ids=[*MEASURABLE, "straight"])
@pytest.mark.parametrize("noise_std", [0., 0.3, 1.])
def test_fitting_white_noise_sees_the_right_image(config, noise_std):
    "At every time the predicted image is the mean of all that fit both the noisy image and the measurement."
    path, t = config.build(), torch.tensor([0, 30, 150, 240, 290])
    x = normal(5, 6, seed=1).double()
    found = predict_x0(fitting(path, noise_std), path, x, t, False, {})
    signal, sigma = path.factors(t, x)
    plain, open_ = signal*x/(signal**2 + sigma**2), sigma**2/(signal**2 + sigma**2)
    misfit = MEASURED.double() - rows_of(plain)
    wanted = plain + misfit @ ROWS.double()*open_/(open_ + noise_std**2)
    assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def fitted_moments(config, noise_std, method):
    """Mean and covariance of the samples.

    Without fresh noise the sampler is a linear function of its start, so seven starts tell both.
    """
    path, starts = config.build(), torch.cat([torch.zeros(1, 6), torch.eye(6)])
    x = sample(fitting(path, noise_std), path, (7, 6), generator=seeded(), method=method, noise=starts,
               clip_sample=False, num_inference_steps=150)
    return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])

def assert_exact(config, noise_std, method, mean_atol, covariance_atol):
    "The samples have the mean and the covariance of what every textbook says about such a measurement."
    for found, wanted, atol in zip(fitted_moments(config, noise_std, method), posterior(noise_std),
                                   (mean_atol, covariance_atol), strict=True):
        assert_close(found, wanted, rtol=0, atol=atol)


@each_measurable
@pytest.mark.parametrize("noise_std", [0.3, 1.])
@pytest.mark.parametrize("method", [ddim_steps, dpm_solver_steps, heun_steps])
def test_fitting_white_noise_is_exact(config, noise_std, method):
    assert_exact(config, noise_std, method, mean_atol=0.01, covariance_atol=0.04)


@pytest.mark.parametrize("noise_std", [0.3, 1.])
@pytest.mark.parametrize("method", [ddpm_steps, partial(dpm_solver_steps, eta=1.)], ids=["ddpm", "dpm++"])
def test_fitting_white_noise_with_fresh_noise(noise_std, method):
    path = MEASURABLE["cosine"].build()
    x = sample(fitting(path, noise_std), path, (4000, 6), generator=seeded(), method=method,
               clip_sample=False)
    mean, covariance = posterior(noise_std)
    assert_close(x.mean(dim=0), mean, rtol=0, atol=0.06)
    assert_close(x.T.cov(), covariance, rtol=0, atol=0.08)


@each_measurable
def test_an_exact_measurement_is_met(config):
    "Also by data that are no white noise, and by each sample."
    path, factor = config.build(), normal(6, 6, seed=5)
    covariance = factor @ factor.T/6
    def misfit(model):
        x = sample(model, path, (200, 6), generator=seeded(), method=ddim_steps, clip_sample=False,
                   num_inference_steps=100)
        return (rows_of(x) - MEASURED).abs().max()
    assert misfit(fitting(path, 0., covariance)) < 0.05 < 1 < misfit(gaussian(path, covariance))


class Linear(nn.Module):
    "A model with weights that want gradients. It keeps the labels that it is told."
    def __init__(self):
        super().__init__()
        self.weight, self.labels = nn.Parameter(normal(6, 6, seed=7)/3), []

    def forward(self, x, t, labels=None):
        self.labels.append(labels)
        return x @ self.weight + t.view(-1, 1)/100


def test_fitting_leaves_no_gradients():
    "Not on the result, nor on the weights or the input, and it works where gradients are switched off."
    path, model, x, t = PATHS["cosine"].build(), Linear(), normal(3, 6), torch.tensor([5, 50, 95])
    fits = fit_measurement(model, path, rows_of, MEASURED, 0.1)
    found = fits(x, t)
    with torch.no_grad(): assert torch.equal(fits(x, t), found) and not torch.is_grad_enabled()
    assert not found.requires_grad and found.grad_fn is None
    assert not x.requires_grad and x.grad is None and model.weight.grad is None
    wanting = x.clone().requires_grad_()
    assert torch.equal(fits(wanting, t), found) and wanting.grad is None
    assert not torch.equal(found, model(x, t))


def test_conditions_reach_the_model_that_is_fitted():
    path, model, labels = PATHS["cosine"].build(), Linear(), torch.tensor([3, 1, 4])
    sample(fit_measurement(model, path, rows_of, MEASURED), path, (3, 6), generator=seeded(),
           num_inference_steps=4, labels=labels)
    assert len(model.labels) == 4 and all(torch.equal(told, labels) for told in model.labels)


def test_images_are_fitted_each_by_itself():
    "Each to its own measurement at its own time, as if it were alone."
    path, model, x, t = PATHS["cosine"].build(), Linear(), normal(3, 6), torch.tensor([5, 50, 95])
    measured = normal(3, 2, seed=1)
    found = fit_measurement(model, path, rows_of, measured, 0.2)(x, t)
    for i in range(3):
        alone = fit_measurement(model, path, rows_of, measured[i:i + 1], 0.2)(x[i:i + 1], t[i:i + 1])
        assert_close(found[i:i + 1], alone, rtol=1e-4, atol=1e-5)
    one = fit_measurement(model, path, rows_of, measured[:1], 0.2)(x, t)
    assert torch.equal(one[0], found[0]) and not torch.allclose(one[1:], found[1:])


def test_measurements_of_pictures():
    "Images of any shape, and a measurement of another one."
    path, x, t = PATHS["cosine"].build(), normal(2, 3, 8, 8), torch.tensor([30, 60])
    def shrink(x): return 4*nn.functional.avg_pool2d(x, 4)
    measured = shrink(uniform(2, 3, 8, 8) - 0.5)
    seen, plain = (shrink(predict_x0(model, path, x, t, False, {})) for model in
                   (fit_measurement(lively, path, shrink, measured), lively))
    one, other = ((part - measured).square().mean() for part in (seen, plain))
    assert seen.shape == (2, 3, 2, 2) and one < other


# --- one picture of your own --------------------------------------------------------------------------------

def pixels(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(path, array, **options):
    "The path of a picture of these pixels."
    Image.fromarray(array).save(path, **options)
    return path


def test_one_picture_in_grey_or_colour(tmp_path):
    "The pixels as they are, with their channels in front; a path may be a string."
    grey, colour = pixels(9, 11), pixels(9, 11, 3)
    found = load_image(saved(tmp_path/"a.png", grey))
    assert found.dtype == torch.uint8 and np.array_equal(found, grey[None])
    assert np.array_equal(load_image(str(saved(tmp_path/"b.png", colour))), colour.transpose(2, 0, 1))


def test_one_picture_is_a_copy(tmp_path):
    "torch would warn if the pixels could not be written to."
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error") # Python 3.10 has no shorter way
            load_image(saved(tmp_path/"a.png", pixels(9, 11)))
    finally: torch.set_warn_always(False)


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_one_picture_with_a_palette(tmp_path, ending):
    "A palette of greys is grey, one of colours has three channels."
    palette = Image.fromarray(pixels(9, 11, 3)).quantize(16)
    palette.save(tmp_path/f"colour.{ending}")
    wanted = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(load_image(tmp_path/f"colour.{ending}"), wanted)
    grey = Image.fromarray(255 - pixels(9, 11))
    grey.putpalette([255 - i//3 for i in range(768)])
    grey.save(tmp_path/f"grey.{ending}")
    assert np.array_equal(load_image(tmp_path/f"grey.{ending}"), pixels(9, 11)[None])


def test_one_picture_is_scaled(tmp_path):
    "The middle square, to the size that was asked for."
    array = np.zeros((40, 64, 3), np.uint8)
    array[:, 12:32], array[:, 32:52] = (200, 0, 0), (0, 0, 100)
    found = load_image(saved(tmp_path/"a.png", array), 10)
    assert found.shape == (3, 10, 10)
    for column, colour in ((2, (200, 0, 0)), (3, (200, 0, 0)), (6, (0, 0, 100)), (7, (0, 0, 100))):
        assert_close(found[:, :, column].float(), torch.tensor(colour)[:, None].expand(3, 10).float(), rtol=0,
                     atol=3)
    assert load_image(saved(tmp_path/"b.png", array[..., 0]), 10).shape == (1, 10, 10)


@pytest.mark.parametrize("turn, way", [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270),
                                       (8, Image.Transpose.ROTATE_90), (2, Image.Transpose.FLIP_LEFT_RIGHT)])
def test_one_picture_stands_upright(tmp_path, turn, way):
    exif = Image.Exif()
    exif[0x0112] = turn
    found = load_image(saved(tmp_path/"a.png", pixels(9, 11, 3), exif=exif))
    upright = np.asarray(Image.fromarray(pixels(9, 11, 3)).transpose(way))
    assert np.array_equal(found, upright.transpose(2, 0, 1))


@pytest.mark.parametrize("content", [None, "folder", b"", b"GIF89a", b"not a picture", "half", "clear"])
def test_one_picture_that_cannot_be_read(tmp_path, content):
    "One line that names the file."
    file = tmp_path/"a.png"
    if content == "folder": file.mkdir()
    elif content == "clear": saved(file, np.dstack([pixels(9, 11, 3), np.full((9, 11), 128, np.uint8)]))
    elif content == "half": file.write_bytes(saved(tmp_path/"b.png", pixels(40, 40)).read_bytes()[:700])
    elif content is not None: file.write_bytes(content)
    with pytest.raises(DataError) as caught: load_image(file, 28)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path/"a.png", pixels(9, 11))
    assert np.array_equal(load_image("~/a.png"), pixels(9, 11)[None])


# --- settings of a run --------------------------------------------------------------------------------------

TINY = Config(model=UNetConfig(image_size=8, num_classes=10, base_channels=8, channel_multipliers=(1, 1),
                               attention_resolutions=(), head_dim=8, num_groups=4),
              scheduler=SchedulerConfig("flow", 50, "flow"), sampling=SamplingConfig(num_inference_steps=10),
              image_shape=(1, 8, 8))
LABELS = {"labels": torch.tensor([3, 1, 4])}


@pytest.fixture(scope="module")
def unet(): return randomised(UNet(TINY.model))


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    "The path of a model of text on latents, with random weights, and its autoencoder beside it."
    folder = tmp_path_factory.mktemp("latent")
    autoencoder = saved_autoencoder(folder/"autoencoder.safetensors")
    config = read_facts(unfitted(autoencoder), without_labels(captioned()))
    config = replace(config, sampling=replace(config.sampling, num_inference_steps=10, guidance_scale=2.))
    save_weights(folder/"random.safetensors", randomised(config.build_model()).state_dict(), config)
    return folder/"random.safetensors"


def sampling_of(config, **changes): return replace(config, sampling=replace(config.sampling, **changes))


def run_of(model, config, cond, seed=0, **kwargs):
    rows = len(next(iter(cond.values())))
    return list(sampling_steps(model, config, rows, cond, generator=seeded(seed), **kwargs))


@pytest.mark.parametrize("n, strength, left", [(10, 1., 10), (10, 0.6, 6), (10, 0.57, 6), (10, 0.02, 1),
                                               (50, 0.5, 25), (50, 0.01, 1), (1, 0.3, 1), (7, 0.9, 6)])
def test_steps_that_are_left(unet, n, strength, left):
    "So many are taken, by each method, and the first one at the end of the shorter path."
    for method, spacing in itertools.product(METHODS, ("time", "karras")):
        config = sampling_of(TINY, method=method, num_inference_steps=n, spacing=spacing)
        assert steps_to_take(config, strength) == left and steps_to_take(config) == n
        run = run_of(unet, config, LABELS, init=torch.zeros(1, 1, 8, 8), strength=strength)
        assert len(run) == left and run[0].t == max(1, round(50*strength)) - 1


def test_full_strength_forgets_the_picture(unet):
    "If the path ends without signal, it is the run from noise with the same seed, to the last bit."
    plain, init = run_of(unet, TINY, LABELS), uniform(1, 1, 8, 8)
    same = run_of(unet, TINY, LABELS, init=init)
    assert len(plain) == len(same) and all(torch.equal(a.x, b.x) for a, b in zip(plain, same))
    other = run_of(unet, TINY, LABELS, init=init, strength=0.9)[-1].x
    assert not torch.allclose(other, plain[-1].x)
    again = run_of(unet, TINY, LABELS, init=init, strength=0.9)[-1].x
    assert torch.equal(other, again)
    assert not torch.equal(other, run_of(unet, TINY, LABELS, 1, init=init, strength=0.9)[-1].x)


@pytest.mark.parametrize("eta", [0., 1.])
@pytest.mark.parametrize("config", [*PATHS.values()], ids=PATHS)
def test_the_start_is_the_picture_with_noise(unet, config, eta):
    "What the model is shown first is what `add_last_noise` makes of the first draw, for each sample."
    config, shown = sampling_of(replace(TINY, scheduler=config), eta=eta, guidance_scale=1.), []
    hook = unet.register_forward_pre_hook(lambda module, args: shown.append(args))
    init = uniform(1, 1, 8, 8)
    try: run_of(unet, config, LABELS, init=init, strength=0.4)
    finally: hook.remove()
    x, t = shown[0]
    start = add_last_noise(shorten_path(config.scheduler.build(), 0.4), init.expand(3, 1, 8, 8),
                           normal(3, 1, 8, 8))
    assert t.tolist() == [39]*3 and torch.equal(x, start)


@each_method
@pytest.mark.parametrize("strength", [0.5, 1.])
def test_a_mask_of_a_run(unet, method, strength):
    "The known part stays, the labels and the guidance count in the rest."
    name, init, mask = method.__name__, uniform(1, 1, 8, 8)*1.8 - 0.9, some(1, 1, 8, 8)
    config = sampling_of(TINY, method=next(n for n in METHODS if METHODS[n].__name__ == name))
    def drawn(config, labels):
        run = run_of(unet, config, {"labels": labels}, init=init, strength=strength, mask=mask)
        assert_close(run[-1].x[mask.expand(3, 1, 8, 8)], init[mask].repeat(3), rtol=0, atol=1e-5)
        return run[-1].x[~mask.expand(3, 1, 8, 8)]
    found = [drawn(config, LABELS["labels"]), drawn(config, torch.tensor([9, 9, 9])),
             drawn(sampling_of(config, guidance_scale=0.), LABELS["labels"])]
    for one, other in itertools.combinations(found, 2): assert (one - other).abs().mean() > 1e-3
    assert (found[0] - init[~mask].repeat(3)).abs().mean() > 0.1


def test_a_run_of_text_on_latents(latent):
    "Latents to begin with: the known ones stay, and the prompt counts in the others."
    model, config = load_model(latent)
    init, mask = normal(1, 4, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4, :] = False
    def drawn(*prompts, strength=0.6, mask=mask):
        run = run_of(model, config, text_conditions(config, prompts), init=init, strength=strength, mask=mask)
        assert len(run) == round(10*strength) and run[-1].x.shape == (2, 4, 8, 8)
        return run[-1].x
    dogs, cats = drawn("red dog", "blue dog"), drawn("cat", "car")
    assert_close(dogs[..., 4:, :], init[..., 4:, :].expand(2, 4, 4, 8), rtol=0, atol=1e-4)
    assert (dogs - cats)[..., :4, :].abs().mean() > 1e-3
    free = drawn("red dog", "blue dog", mask=None)
    assert (free - init)[..., 4:, :].abs().mean() > 0.1


def started(config=TINY, codec=PIXELS, **options):
    return read_start(SampleOptions(**options), config, codec)


def test_what_the_options_ask_for(tmp_path):
    "Nothing without a picture; otherwise its pixels as the model sees them, and how much may change."
    init, mask = (saved(tmp_path/f"{name}.png", pixels(8, 8)) for name in ("init", "mask"))
    assert started() == ({}, PIXELS)
    start, codec = started(init_image=init)
    assert start.keys() == {"init", "strength"} and start["strength"] == 0.6 and codec is PIXELS
    assert torch.equal(start["init"], to_float(torch.from_numpy(pixels(8, 8))[None, None]))
    assert started(init_image=init, strength=0.25)[0]["strength"] == 0.25
    start, codec = started(init_image=init, mask=mask)
    assert start.keys() == {"init", "strength", "mask"} and start["strength"] == 1 and codec is not PIXELS
    assert started(init_image=init, mask=mask, strength=0.25)[0]["strength"] == 0.25


@pytest.mark.parametrize("colour, stays", [(0, True), (127, True), (128, False), (255, False),
                                           ((255, 0, 0), True), ((255, 255, 0), False)])
def test_how_dark_a_mask_must_be(tmp_path, colour, stays):
    "What is nearer to black than to white stays; of colours the mean counts."
    mask = np.full((8, 8, *np.shape(colour)), 255, np.uint8)
    mask[2:4] = colour
    options = dict(init_image=saved(tmp_path/"init.png", pixels(8, 8)), mask=saved(tmp_path/"a.png", mask))
    found = started(**options)[0]["mask"]
    assert found.shape == (1, 1, 8, 8) and found.dtype == torch.bool
    assert found[0, 0].tolist() == [[stays and 2 <= row < 4]*8 for row in range(8)]


def test_what_stays_is_put_back(tmp_path):
    "Whatever the codec makes of the samples, the pixels under black are those of the picture."
    array = pixels(8, 8)
    mask = np.full((8, 8), 255, np.uint8)
    mask[:, 3:] = 0
    _, codec = started(init_image=saved(tmp_path/"init.png", array), mask=saved(tmp_path/"mask.png", mask))
    drawn = pixels(5, 1, 8, 8, seed=1)
    found = codec.decode(to_float(torch.from_numpy(drawn)))
    assert found.dtype == torch.uint8 and found.shape == (5, 1, 8, 8)
    assert np.array_equal(found, np.where(mask == 0, array, drawn))


def test_pictures_that_are_not_square(tmp_path):
    "They must have the right size already, and the message names it."
    config = replace(TINY, image_shape=(1, 24, 28))
    right, wrong = saved(tmp_path/"right.png", pixels(24, 28)), saved(tmp_path/"wrong.png", pixels(28, 24))
    assert started(init_image=right, config=config)[0]["init"].shape == (1, 1, 24, 28)
    for options in (dict(init_image=wrong), dict(init_image=right, mask=wrong)):
        with pytest.raises(ConfigError, match="wrong.png has 24x28 pixels; 28x24 are needed"):
            started(config=config, **options)


def test_a_mask_for_latents(latent, tmp_path):
    "The model gets the small mask, the pixels of the large one are put back."
    config, array = load_model(latent)[1], np.zeros((32, 32), np.uint8)
    array[:8] = 255
    codec = load_codec(config)
    init, mask = saved(tmp_path/"init.png", pixels(32, 32, 3)), saved(tmp_path/"mask.png", array)
    start, back = started(init_image=init, mask=mask, config=config, codec=codec)
    assert start["init"].shape == (1, 4, 8, 8) and start["mask"].shape == (1, 1, 8, 8)
    assert start["mask"][0, 0].all(dim=1).tolist() == [False]*3 + [True]*5
    assert_close(start["init"], codec.encode(load_image(init)[None]))
    found = back.decode(start["init"])
    assert torch.equal(found[0][:, 8:], load_image(init)[:, 8:])
    assert torch.equal(found[0][:, :8], codec.decode(start["init"])[0][:, :8])


# --- the command --------------------------------------------------------------------------------------------

GARMENT = load_sample("test").images[3]


@pytest.fixture
def shirt(tmp_path):
    "A garment of 28 by 28 pixels as a file."
    return saved(tmp_path/"shirt.png", GARMENT[0].numpy())


@pytest.fixture
def half(tmp_path):
    "A mask of another size: the left half is black and stays."
    mask = np.zeros((56, 56), np.uint8)
    mask[:, 28:] = 255
    return saved(tmp_path/"half.png", mask)


def drawn(folder, *args, steps=5, n=2):
    "The images that the command draws with few steps: (n, H, W, C) in whole numbers with a sign."
    output = folder/"drawn.npz"
    assert command(command_sample, "--num_samples", n, "--num_inference_steps", steps, "--device", "cpu",
                   "--precision", "fp32", "--output", output, *args) == 0
    with np.load(output) as file: return file["arr_0"].astype(int)


def refused(capsys, *args, code=2):
    "The only line of an error. Nothing is drawn."
    capsys.readouterr()
    assert command(command_sample, "--device", "cpu", *args) == code
    said = capsys.readouterr().err
    assert one_error(said) and said.count("\n") == 1
    return said


def changed(images, garment=GARMENT): return np.abs(images - garment.permute(1, 2, 0).numpy()).mean()


def test_the_strength_decides_how_far_it_goes(shirt, tmp_path):
    "Little strength is little change. With all of it the picture is that from noise with the same seed."
    found = {s: drawn(tmp_path, "--init_image", shirt, "--strength", s, steps=20) for s in (0.05, 0.5, 1)}
    assert 0 < changed(found[0.05]) < 6 < changed(found[0.5]) < 25 < changed(found[1])
    assert found[1].shape == (2, 28, 28, 1)
    assert np.abs(found[1] - drawn(tmp_path, steps=20)).max() <= 4 # the last time has a trace of it


def test_the_same_seed_is_the_same_picture(shirt, tmp_path, capsys):
    "The strength is 0.6 if it was not named, and the last line says so."
    one = drawn(tmp_path, "--init_image", shirt)
    assert f"from {shirt.name} with strength 0.6): {tmp_path}" in capsys.readouterr().out
    assert np.array_equal(one, drawn(tmp_path, "--init_image", shirt, "--strength", 0.6))
    for args in (["--seed", 1], ["--class_label", 8], ["--strength", 0.8], ["--guidance_scale", 0]):
        assert not np.array_equal(one, drawn(tmp_path, "--init_image", shirt, *args))

def test_a_picture_serves_every_batch(shirt, tmp_path):
    "Each sample gets its own noise. Without fresh noise the first has the same one in any batch."
    args = ["--init_image", shirt, "--eta", 0, "--class_label", 8]
    whole, single = drawn(tmp_path, *args, n=3), drawn(tmp_path, *args, "--batch_size", 1, n=3)
    assert whole.shape == single.shape == (3, 28, 28, 1) and np.abs(whole[0] - single[0]).max() <= 1
    for images in (whole, single):
        assert all(np.abs(a - b).mean() > 1 for a, b in itertools.combinations(images, 2))


def test_a_picture_of_another_size_is_scaled(tmp_path):
    "The middle square counts, and the file may be in any format."
    large = np.full((84, 120), 255, np.uint8)
    large[:, 18:-18] = GARMENT[0].numpy().repeat(3, 0).repeat(3, 1)
    file = saved(tmp_path/"large.bmp", large)
    scaled = saved(tmp_path/"scaled.png", load_image(file, 28)[0].numpy())
    found = [drawn(tmp_path, "--strength", 0.3, "--init_image", path) for path in (file, scaled)]
    assert np.array_equal(*found) and changed(found[0]) < 30


@pytest.mark.parametrize("args", [[], ["--strength", 0.4], ["--method", "heun"], ["--method", "ddpm"],
                                  ["--method", "ddim", "--eta", 1]])
def test_what_is_black_in_the_mask_stays(shirt, half, tmp_path, args, capsys):
    "To the last bit, and the other half is new. With a mask the strength is 1 if it was not named."
    found = drawn(tmp_path, "--init_image", shirt, "--mask", half, *args)
    known = GARMENT.permute(1, 2, 0).numpy()
    assert (found[:, :, :14] == known[:, :14]).all()
    assert all(np.abs(image[:, 14:] - known[:, 14:]).mean() > 5 for image in found)
    assert f"with strength {0.4 if '--strength' in args else 1})" in capsys.readouterr().out


def test_the_new_part_fits_the_known_one(shirt, half, tmp_path):
    "The model is told what is known: the free half differs from one that knows nothing of it."
    found = drawn(tmp_path, "--init_image", shirt, "--mask", half)
    assert np.abs(found - drawn(tmp_path))[:, :, 14:].mean() > 5


def cells(path, rows, columns):
    "The garments in a grid: (rows, columns, 28, 28)."
    with Image.open(path) as picture: array = np.asarray(picture.convert("L"))
    assert array.shape == (58*rows + 2, 58*columns + 2)
    return np.stack([[array[2 + 58*i:58 + 58*i:2, 2 + 58*j:58 + 58*j:2] for j in range(columns)]
                     for i in range(rows)])


def test_the_way_from_a_picture(shirt, half, tmp_path):
    "A strip has a picture for each step that is left, and all of them have the known half."
    args = ["--mode", "progressive", "--init_image", shirt, "--num_inference_steps", 10, "--num_samples", 3,
            "--device", "cpu", "--output", tmp_path/"strip.png"]
    assert command(command_sample, *args) == 0
    plain = cells(tmp_path/"strip.png", 3, 6)
    assert np.abs(plain[:, -1].astype(int) - plain[:, 0]).mean() > 5
    assert command(command_sample, *args, "--mask", half, "--strength", 0.4) == 0
    strip = cells(tmp_path/"strip.png", 3, 4)
    assert (strip[..., :14] == GARMENT[0].numpy()[:, :14]).all() and strip[..., 14:].std(axis=0).mean() > 1
    assert command(command_sample, *args[:-1], tmp_path/"film.gif") == 0
    with Image.open(tmp_path/"film.gif") as gif: assert gif.n_frames == 6


def test_a_row_for_each_class(shirt, half, tmp_path):
    "All begin with the same picture, and each becomes its own class."
    args = ["--mode", "class_grid", "--init_image", shirt, "--mask", half, "--num_inference_steps", 5,
            "--num_samples", 20, "--device", "cpu", "--output", tmp_path/"rows.png"]
    assert command(command_sample, *args) == 0
    rows = cells(tmp_path/"rows.png", 10, 2)
    assert (rows[..., :14] == GARMENT[0].numpy()[:, :14]).all()
    for one, other in itertools.combinations(rows, 2): assert np.abs(one - 1.*other)[..., 14:].mean() > 2


def test_one_channel_or_three(shirt, latent, tmp_path, capsys):
    "A picture in colour is too much for a model in grey. A grey one will do for a model of colours."
    colour = saved(tmp_path/"colour.png", pixels(28, 28, 3))
    said = refused(capsys, "--init_image", colour, "--output_dir", tmp_path/"run")
    assert f"{colour} has colours, and the model draws in grey" in said and not (tmp_path/"run").exists()
    text = "--checkpoint", latent, "--prompt", "red dog", "--strength", 0.1
    assert drawn(tmp_path, *text, "--init_image", shirt, steps=10).shape == (2, 32, 32, 3)


def test_text_on_latents_begins_with_a_picture(latent, tmp_path, capsys):
    "The known pixels stay to the last bit, the prompt and the negative one count in the rest."
    array = np.zeros((32, 32), np.uint8)
    array[:16] = 255
    init, mask = saved(tmp_path/"init.png", pixels(40, 50, 3)), saved(tmp_path/"mask.png", array)
    text = "--checkpoint", latent, "--init_image", init, "--prompt"
    masked = *text, "red dog", "--mask", mask
    found = [drawn(tmp_path, *args, steps=10) for args in
             (masked, [*text, "cat", "--mask", mask], [*masked, "--negative_prompt", "blue"])]
    known = load_image(init, 32).permute(1, 2, 0).numpy()
    for images in found: assert (images[:, 16:] == known[16:]).all()
    for one, other in itertools.combinations(found, 2): assert np.abs(one - other)[:, :16].mean() > 0.5
    free = [drawn(tmp_path, *text, "red dog", "--strength", s, steps=10) for s in (0.1, 0.6)]
    assert not np.array_equal(*free) and "with strength 0.6)" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--init_image", "--mask"])
@pytest.mark.parametrize("content", [None, b"not a picture", "half"])
def test_files_that_are_no_pictures(shirt, tmp_path, option, content, capsys):
    "One line names the file, and nothing is written."
    file = tmp_path/"x.png"
    if content == "half": content = shirt.read_bytes()[:300]
    if content is not None: file.write_bytes(content)
    begin = [] if option == "--init_image" else ["--init_image", shirt]
    said = refused(capsys, *begin, option, file, "--output_dir", tmp_path/"run", code=1)
    assert f"{file} cannot be read" in said and not (tmp_path/"run").exists()


def test_a_mask_that_leaves_nothing_to_draw(shirt, tmp_path, capsys):
    black = saved(tmp_path/"black.png", np.zeros((28, 28), np.uint8))
    said = refused(capsys, "--init_image", shirt, "--mask", black, "--output_dir", tmp_path/"run")
    assert f"{black} has no white pixel: nothing may change" in said and not (tmp_path/"run").exists()


@pytest.mark.parametrize("name", ["small_few", "small_one"])
def test_a_student_begins_with_noise(shirt, name, tmp_path, capsys):
    said = refused(capsys, "--checkpoint", name, "--init_image", shirt, "--output_dir", tmp_path/"run")
    assert "init_image: a student knows its own few times only" in said and not (tmp_path/"run").exists()


@pytest.mark.parametrize("args, says", [
    (["--mask", "x.png"], "mask needs an init_image"), (["--strength", 0.5], "strength needs an init_image"),
    (["--init_image", "x.png", "--strength", 0], "strength must be in (0, 1], not 0.0"),
    (["--init_image", "x.png", "--strength", 1.5], "strength must be in (0, 1], not 1.5"),
    (["--init_image", "x.png", "--strength", "nan"], "strength must be in (0, 1], not nan"),
    (["--init_image", "x.png", "--strength", -1], "strength must be in (0, 1], not -1.0")])
def test_options_that_do_not_fit(args, says, tmp_path, capsys):
    "Exit code 2 before anything is read."
    assert command(command_sample, *args, "--output_dir", tmp_path/"run") == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path/"run").exists()

@pytest.mark.parametrize("config", [STRAIGHT, replace(MEASURABLE["v"], zero_terminal_snr=True)],
                         ids=["straight", "no signal"])
@pytest.mark.parametrize("noise_std", [0.3, 1.])
@pytest.mark.parametrize("method", [ddim_steps, dpm_solver_steps, heun_steps])
def test_fitting_from_a_time_without_signal(config, noise_std, method):
    "There the noisy image says nothing, and the samples are exact all the same."
    assert_exact(config, noise_std, method, mean_atol=0.03, covariance_atol=0.06)


def test_a_missing_picture_need_not_be_removed(tmp_path):
    "Nor one that is damaged: it is the user's own."
    (tmp_path/"damaged.png").write_bytes(b"x")
    for name in ("missing.png", "damaged.png"):
        with pytest.raises(DataError) as caught: load_image(tmp_path/name)
        assert name in str(caught.value) and "remove it" not in str(caught.value)


def test_a_size_that_is_too_small_names_the_file(tmp_path):
    file = saved(tmp_path/"a.png", pixels(9, 11))
    with pytest.raises(DataError, match="a.png"): load_image(file, 7)


def test_the_last_line_counts_the_steps_that_are_left(shirt, tmp_path, capsys):
    drawn(tmp_path, "--init_image", shirt, "--strength", 0.5, steps=10)
    assert "dpm++, 5 steps" in capsys.readouterr().out


@pytest.mark.parametrize("options", [dict(strength=0.5), dict(mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))])
def test_strength_and_mask_need_a_picture(unet, options):
    with pytest.raises(ValueError, match="init"): run_of(unet, TINY, LABELS, **options)
