"""The noise schedule, compared with closed forms in float64 and with diffusers."""
import math

import pytest
import reference
import torch
from peers import diffusers_scheduler
from torch import nn
from torch.testing import assert_close

from ddpm_tutorial.sampler import ddpm_steps
from ddpm_tutorial.scheduler import (
    PREDICTION_TYPES,
    SCHEDULES,
    VARIANCE_TYPES,
    NoisePath,
    NoiseScheduler,
    SchedulerConfig,
    check_batch,
    cosine_betas,
    flow_path,
    from_betas,
    linear_betas,
)

BETAS = {"linear": linear_betas, "cosine": cosine_betas}
CASES = [("linear", 1000), ("linear", 50), ("cosine", 1000), ("cosine", 50)]
EXACT = dict(rtol=0, atol=1e-12)    # for numbers of about 1: some thousand rounding errors of 1e-16


def scheduler_of(schedule, T, **kwargs): return SchedulerConfig(schedule, T, **kwargs).build()


@pytest.fixture
def float64():
    "New tensors are float64, including the sampler's noise."
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def some_images(n, seed=0):
    "Clean images and noise in float64."
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, 2, 3, 3, generator=generator, dtype=torch.float64)*2 - 1
    return x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64)


def per_image(numbers): return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.mark.parametrize("schedule, T", CASES)
def test_betas_and_their_products(schedule, T):
    "Betas and cumulative products agree with plain Python."
    betas, scheduler = reference.betas(schedule, T), scheduler_of(schedule, T)
    assert_close(BETAS[schedule](T), torch.tensor(betas, dtype=torch.float64), **EXACT)
    expected = torch.tensor([reference.alpha_bar(betas, t) for t in range(T)], dtype=torch.float64)
    assert_close(scheduler.signal, expected.sqrt(), rtol=1e-12, atol=0)    # relative: the last ones are tiny
    assert_close(scheduler.sigma, (1 - expected).sqrt(), **EXACT)
    assert len(scheduler) == T


def test_cosine_products_follow_the_cosine():
    """The cumulative product is the squared cosine itself.

    Only the last step differs, because its beta is capped below 1.
    """
    def f(u): return math.cos((u + 0.008)/1.008 * math.pi/2)**2
    scheduler = NoiseScheduler.cosine(100)
    expected = torch.tensor([f((t + 1)/100)/f(0) for t in range(99)], dtype=torch.float64)
    assert_close(scheduler.signal[:-1]**2, expected, **EXACT)
    assert cosine_betas(100)[-1] == 0.999


@pytest.mark.parametrize("T", [50, 200, 1000, 4000])
def test_the_end_is_noise_for_every_length(T):
    "Both schedules start near the clean image and end near pure noise, whatever T is."
    for scheduler in (NoiseScheduler.linear(T), NoiseScheduler.cosine(T)):
        first, last = scheduler.signal[0].item()**2, scheduler.signal[-1].item()**2
        assert first > 0.99 and last < 1e-4
        assert (scheduler.signal.diff() < 0).all()


@pytest.mark.parametrize("schedule, T", CASES)
def test_add_noise_and_velocity(schedule, T):
    "Each image is mixed with noise according to its own time, and at time -1 it is clean."
    betas, scheduler = reference.betas(schedule, T), scheduler_of(schedule, T)
    t = torch.tensor([0, 1, T//2, T - 1, -1])
    x0, noise = some_images(len(t))
    a = per_image([reference.alpha_bar(betas, time) for time in t.tolist()])
    assert_close(scheduler.add_noise(x0, noise, t), a**0.5*x0 + (1 - a)**0.5*noise, **EXACT)
    velocity = scheduler_of(schedule, T, prediction_type="v_prediction").target(x0, noise, t)
    assert_close(velocity, a**0.5*noise - (1 - a)**0.5*x0, **EXACT)
    assert torch.equal(scheduler.add_noise(x0, noise, t)[-1], x0[-1])
    assert scheduler.add_noise(x0.float(), noise.float(), t).dtype == torch.float32


def test_many_small_steps_are_one_big_step():
    "Noise added step by step has the same mean and variance as noise added at once by `add_noise`."
    scheduler = NoiseScheduler.linear(50)
    signal, variance, zero = 1., 0., torch.zeros(1, 1, dtype=torch.float64)
    for t, beta in enumerate(linear_betas(50).tolist()):
        # x_t = sqrt(1 - beta) x + sqrt(beta) noise
        signal, variance = math.sqrt(1 - beta)*signal, (1 - beta)*variance + beta
        at = torch.tensor([t])
        assert abs(scheduler.add_noise(zero + 1, zero, at).item() - signal) < 1e-12
        assert abs(scheduler.add_noise(zero, zero + 1, at).item()**2 - variance) < 1e-12


@pytest.mark.parametrize("stride", [1, 7])
@pytest.mark.parametrize("schedule, T", CASES)
def test_posterior_is_bayes_rule(schedule, T, stride):
    """The posterior mean and both variances are those of two normal densities multiplied.

    The previous time is the neighbour or a stride away.
    """
    betas, t = reference.betas(schedule, T), torch.tensor([0, 1, stride, T//2, T - 1])
    prev_t = (t - stride).clamp(min=-1)
    posteriors = [reference.posterior(betas, *pair) for pair in zip(t.tolist(), prev_t.tolist())]
    of_x0, of_x_t, small, large = map(per_image, zip(*posteriors))
    x0, x_t = some_images(len(t))
    for variance_type, expected in (("fixed_small", small), ("fixed_large", large)):
        scheduler = scheduler_of(schedule, T, variance_type=variance_type)
        mean, variance = scheduler.posterior(x0, x_t, t, prev_t)
        assert_close(mean, of_x0*x0 + of_x_t*x_t, **EXACT)
        # relative: 1 - alpha_bar is 1e-4 at first, so four digits are lost
        assert_close(variance, expected, rtol=1e-10, atol=0)
    if stride == 1: assert torch.equal(scheduler_of(schedule, T).posterior(x0, x_t, t)[0], mean)


@pytest.mark.parametrize("T", [50, 1000])
def test_snr(T):
    "The SNR is alpha_bar/(1 - alpha_bar), and it falls at every step."
    for schedule in ("linear", "cosine"):
        betas, scheduler = reference.betas(schedule, T), scheduler_of(schedule, T)
        a = torch.tensor([reference.alpha_bar(betas, t) for t in range(T)], dtype=torch.float64)
        snr = scheduler.snr(torch.arange(T))
        assert_close(snr, a/(1 - a), rtol=1e-10, atol=0)
        assert (snr.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_three_predictions_say_the_same(schedule):
    "A perfect prediction of any type converts to the right x0 and noise at every time."
    t = torch.arange(200)
    x0, noise = some_images(len(t))
    for prediction_type in PREDICTION_TYPES:
        if (schedule, prediction_type) == ("flow", "epsilon"): continue    # refused: the last signal is 0
        scheduler = scheduler_of(schedule, 200, prediction_type=prediction_type)
        x_t = scheduler.add_noise(x0, noise, t)
        got_x0, got_noise = scheduler.to_x0_and_noise(scheduler.target(x0, noise, t), x_t, t)
        # "epsilon" divides by sqrt(alpha_bar), 1e-4 at the end
        # "sample" divides by sqrt(1 - alpha_bar), 1e-2 at the start
        assert_close(got_x0, x0, rtol=0, atol=1e-10)
        assert_close(got_noise, noise, rtol=0, atol=1e-10)


def test_targets_are_what_their_names_say():
    """Each target is the noise, the image or the velocity that its name promises.

    The round trip above would not notice if two of them were swapped.
    """
    t = torch.arange(50)
    x0, noise = some_images(50)
    def target(kind): return NoiseScheduler.cosine(50, prediction_type=kind).target(x0, noise, t)
    assert torch.equal(target("epsilon"), noise) and torch.equal(target("sample"), x0)
    assert torch.equal(target("flow"), noise - x0)
    expected = diffusers_scheduler("cosine", 50, exact=True).get_velocity(x0, noise, t)
    assert_close(target("v_prediction"), expected, **EXACT)


def test_timesteps_for_every_length():
    """For every T and n there are n pairs, from T - 1 down to clean data.

    Each pair starts where the one before ends, and the times are evenly spread.
    """
    cases = [(T, range(1, T + 1)) for T in range(1, 41)] + [(1000, range(1, 1001, 7)), (1000, (999, 1000))]
    for T, counts in cases:
        scheduler = NoiseScheduler.cosine(T)
        for n in counts:
            pairs = scheduler.timesteps(n)
            times = [t for t, _ in pairs]
            assert len(pairs) == n and times[0] == T - 1 and pairs[-1][1] == -1
            assert all(prev_t < t for t, prev_t in pairs)
            assert [prev_t for _, prev_t in pairs[:-1]] == times[1:]
            if n > 1:
                assert times[-1] == 0
                assert all(abs(t - (T - 1)*(1 - i/(n - 1))) < 0.5 + 1e-9 for i, t in enumerate(times))
        assert scheduler.timesteps() == scheduler.timesteps(T)
        for n in (0, T + 1):
            with pytest.raises(ValueError, match="num_inference_steps must be in"): scheduler.timesteps(n)


@pytest.mark.parametrize("n", [1, 2, 10, 50, 333, 1000])
def test_timesteps_against_diffusers(n):
    "The times are those of diffusers with `linspace` spacing."
    theirs = diffusers_scheduler("linear", 1000, timestep_spacing="linspace")
    theirs.set_timesteps(n)
    expected = theirs.timesteps.tolist() if n > 1 else [999]   # theirs is [0] for n = 1, which is no noise
    assert [t for t, _ in NoiseScheduler.linear(1000).timesteps(n)] == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_against_diffusers(schedule):
    """Betas, products and noisy images are those of diffusers.

    Their numbers are float32, rounded to 6e-8. The square roots magnify that error.
    """
    ours, theirs = scheduler_of(schedule, 1000), diffusers_scheduler(schedule, 1000)
    t = torch.arange(1000)
    assert_close(BETAS[schedule](1000).float(), theirs.betas, rtol=0, atol=1e-7)
    assert_close((ours.signal**2).float(), theirs.alphas_cumprod, rtol=0, atol=2e-6)
    x0, noise = (x.float() for x in some_images(1000))
    assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=5e-5)


@pytest.mark.parametrize("exact, tolerance", [(False, 1e-4), (True, 1e-12)])
@pytest.mark.parametrize("n", [200, 20])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", reference.PREDICTION_TYPES)   # DDPMScheduler has no "flow"
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_sampling_against_diffusers(schedule, prediction_type, variance_type, n, exact, tolerance, float64):
    """Every step from noise to image is that of diffusers, over all 200 times and in strides.

    Once diffusers uses its own float32 table, once an exact one.
    """
    model = reference.gaussian_denoiser(reference.betas(schedule, 200), prediction_type, mean=0.2, std=0.6)
    ours = scheduler_of(schedule, 200, prediction_type=prediction_type, variance_type=variance_type)
    theirs = diffusers_scheduler(schedule, 200, exact, prediction_type=prediction_type,
                                 variance_type=variance_type)
    theirs.set_timesteps(timesteps=[t for t, _ in ours.timesteps(n)])
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 4, 4)
    x = torch.randn(shape, generator=generator)
    steps = ddpm_steps(model, ours, shape, generator=torch.Generator().manual_seed(0), num_inference_steps=n,
                       clip_sample=False)
    for t, step in zip(theirs.timesteps, steps, strict=True):
        x, x0 = theirs.step(model(x, t.expand(3)), t, x, generator=generator, return_dict=False)
        assert_close(step.x, x, rtol=0, atol=tolerance)
        # in float32, x0 from noise is divided by as little as 5e-4
        if exact: assert_close(step.x0, x0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("t, prev_t", [(0, -1), (1, 0), (24, 23), (30, 7), (48, 20), (49, 48), (49, 10)])
def test_posterior_on_the_straight_path(t, prev_t):
    """The path does not preserve variance, but the posterior is still two normal densities multiplied.

    The previous time is the neighbour or a stride away.
    """
    scheduler, x0, x_t = NoiseScheduler.flow(50), 0.7, -0.4
    (signal, sigma), (signal_prev, sigma_prev) = reference.flow(50, t), reference.flow(50, prev_t)
    ratio = signal/signal_prev
    added = sigma**2 - ratio**2*sigma_prev**2
    at, prev, one = torch.tensor([t]), torch.tensor([prev_t]), torch.ones(1, 1, dtype=torch.float64)
    expected = torch.tensor([ratio, added], dtype=torch.float64)
    assert_close(torch.stack(scheduler.transition(at, prev, one)).flatten(), expected, **EXACT)
    mean, variance = scheduler.posterior(x0*one, x_t*one, at, prev)
    large = NoiseScheduler.flow(50, variance_type="fixed_large").posterior(x0*one, x_t*one, at, prev)[1]
    assert abs(large.item() - added) < 1e-12
    if prev_t < 0: expected = x0, 0.                            # the previous image is x0 itself: it is known
    elif ratio == 0: expected = signal_prev*x0, sigma_prev**2   # pure noise says nothing about its origin
    else:
        expected = reference.product_of_gaussians(signal_prev*x0, sigma_prev**2, x_t/ratio, added/ratio**2)
    assert abs(mean.item() - expected[0]) < 1e-12 and abs(variance.item() - expected[1]) < 1e-12


def test_the_straight_path():
    "The signal is 1 - u and sigma is u; target, implied noise and SNR follow from them."
    scheduler, t = NoiseScheduler.flow(8), torch.arange(-1, 8)
    x0, noise = some_images(9)
    u = per_image([i/8 for i in range(9)])
    assert_close(scheduler.add_noise(x0, noise, t), (1 - u)*x0 + u*noise, **EXACT)
    assert_close(scheduler.target(x0, noise, t), noise - x0, **EXACT)
    assert_close(scheduler.implied_noise(x0, scheduler.add_noise(x0, noise, t), t)[1:], noise[1:], **EXACT)
    assert_close(scheduler.snr(t), ((1 - u)/u).flatten()**2, rtol=1e-12, atol=0)
    assert scheduler.prediction_type == "flow"
    assert torch.equal(SchedulerConfig("flow", 8, "flow").build().sigma, scheduler.sigma)


HALF = torch.full((4,), 0.5, dtype=torch.float64)
FALLING = torch.linspace(0.9, 0.2, 4, dtype=torch.float64)


@pytest.mark.parametrize("signal, sigma, message", [
    (FALLING.float(), HALF, "signal must be float64"), (FALLING, HALF.float(), "sigma must be float64"),
    (FALLING[None], HALF, "signal must be"), (FALLING[:3], HALF, "one value for each time, not 3 and 4"),
    (FALLING + 0.2, HALF, r"signal must be in \[0, 1\]"), (-FALLING, HALF, r"signal must be in \[0, 1\]"),
    (FALLING*math.nan, HALF, r"signal must be in \[0, 1\]"), (FALLING, 3*HALF, r"sigma must be in \(0, 1\]"),
    (FALLING, 0*HALF, r"sigma must be in \(0, 1\]"), (0*FALLING, HALF, "only the last signal"),
    (HALF, HALF, "signal/sigma must fall"), (FALLING.flip(0), HALF, "signal/sigma must fall"),
    (FALLING[:0], HALF[:0], "signal must be float64")])
def test_paths_that_cannot_work_are_refused(signal, sigma, message):
    with pytest.raises(ValueError, match=message): NoisePath(signal, sigma)


def test_a_new_path_is_one_constructor():
    """A new path takes ten lines, and the samplers work with it.

    This one is straight, but slower at the noisy end.
    """
    def slow_path(num_steps):
        u = flow_path(num_steps)[1]**0.5
        return 1 - u, u
    scheduler = NoiseScheduler(*slow_path(50), prediction_type="flow")
    x0, noise = some_images(1)
    def model(x, t): return noise.float() - x0.float()
    steps = ddpm_steps(model, scheduler, noise.shape, generator=torch.Generator().manual_seed(0),
                       num_inference_steps=5)
    x = list(steps)[-1].x
    expected = (1 - 0.5**0.5)*x0 + 0.5**0.5*noise
    assert_close(scheduler.add_noise(x0, noise, torch.tensor([24])), expected, **EXACT)
    assert x.isfinite().all()


def test_zero_terminal_snr():
    """A last beta of 1 leaves no signal.

    For noise prediction it is refused with the reason. The other predictions give finite numbers.
    """
    betas = torch.cat([linear_betas(30)[:-1], torch.ones(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="cannot be computed from noise alone"):
        NoiseScheduler(*from_betas(betas))
    x0, noise = some_images(1)
    for prediction_type in ("sample", "v_prediction", "flow"):
        scheduler = NoiseScheduler(*from_betas(betas), prediction_type=prediction_type)
        t = torch.tensor([29])
        x_t = scheduler.add_noise(x0, noise, t)
        assert torch.equal(x_t, noise)
        got_x0, got_noise = scheduler.to_x0_and_noise(scheduler.target(x0, noise, t), x_t, t)
        assert_close(got_x0, x0, **EXACT)
        assert_close(got_noise, noise, **EXACT)
        assert all(part.isfinite().all() for part in scheduler.posterior(x0, x_t, t))


@pytest.mark.parametrize("make, message", [
    (lambda: NoiseScheduler.linear(prediction_type="noise"), "prediction_type must be one of"),
    (lambda: NoiseScheduler.linear(variance_type="learned"), "variance_type must be one of"),
    (lambda: from_betas(linear_betas(50).float()), "betas must be float64"),
    (lambda: from_betas(torch.zeros(3, dtype=torch.float64)), r"betas must be in \(0, 1\]"),
    (lambda: NoiseScheduler.flow(prediction_type="epsilon"), "cannot be computed from noise alone"),
    (lambda: SchedulerConfig("flow"), "cannot be computed from noise alone"),
    (lambda: linear_betas(20), "at least 21 steps"),
    (lambda: cosine_betas(0), "at least 1"),
    (lambda: SchedulerConfig("sigmoid"), "schedule must be one of"),
])
def test_what_cannot_work_is_refused(make, message):
    "Wrong settings raise an error at once, and its message names the field."
    with pytest.raises(ValueError, match=message): make()


def test_betas_that_are_no_tensor_are_refused():
    "A list or a numpy array has no torch dtype to complain about, so it is refused as no tensor."
    for betas in ([0.1, 0.2], linear_betas(50).numpy()):
        with pytest.raises(TypeError, match="betas must be a tensor, not"): from_betas(betas)
        with pytest.raises(TypeError, match="signal must be a tensor, not"):
            NoisePath(betas, linear_betas(50))


IMAGES = {"add_noise": ("x0", "noise"), "target": ("x0", "noise"), "to_x0_and_noise": ("output", "x_t"),
          "posterior": ("x0", "x_t"), "implied_noise": ("x0", "x_t")}
each_method = pytest.mark.parametrize("method", IMAGES)
each_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


@each_method
@each_prediction
def test_images_that_do_not_fit_are_refused(method, prediction_type):
    """Images must be floating point and have the same shape.

    Whole numbers would be multiplied by coefficients rounded to 0, and different shapes would be broadcast.
    """
    call = getattr(NoiseScheduler.cosine(50, prediction_type=prediction_type), method)
    t = torch.tensor([0, 7, 49])
    x = torch.zeros(3, 1, 4, 4)
    call(x, x, t)
    for place, name in enumerate(IMAGES[method]):
        def both(other): return [other if i == place else x for i in range(2)]
        for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match=f"{name} must be floating point, not {dtype}"):
                call(*both(x.to(dtype)), t)
        with pytest.raises(TypeError, match=f"{name} must be floating point, not float32"):
            call(*both(x.numpy()), t)
        for other in (x[:1], x[:2], x[0], x[..., :1], x.expand(3, 2, 4, 4), x.flatten(1), x[..., None]):
            with pytest.raises(ValueError, match="must have the same shape"): call(*both(other), t)


@each_method
@each_prediction
def test_times_that_do_not_fit_are_refused(method, prediction_type):
    "Times must be int64, one for each image. `posterior` checks the earlier times too."
    call = getattr(NoiseScheduler.cosine(50, prediction_type=prediction_type), method)
    t = torch.tensor([9, 7, 49])
    x = torch.zeros(3, 1, 4, 4)
    wrong_types = (t.int(), t.float(), t > 8, 7, [9, 7, 49], t.numpy())
    wrong_shapes = (t[:1], t[:2], torch.tensor(7), t[:, None])
    for wrong in wrong_types:
        with pytest.raises(TypeError, match=r"^t must be int64 \(B,\), not "): call(x, x, wrong)
    for wrong in wrong_shapes:
        with pytest.raises(ValueError, match=r"^t must be \(B,\), one time for each image, not "):
            call(x, x, wrong)
    if method != "posterior": return
    call(x, x, t, t - 3)
    for wrong in wrong_types:
        with pytest.raises(TypeError, match=r"^prev_t must be int64"): call(x, x, t, wrong)
    for wrong in wrong_shapes:
        with pytest.raises(ValueError, match=r"^prev_t must be \(B,\)"): call(x, x, t, wrong)


def test_times_alone_are_checked():
    """Methods that take no images check their times too.

    `factors` accepts any number of times.
    """
    scheduler = NoiseScheduler.cosine(50)
    x, t = torch.zeros(3, 1, 4, 4), torch.tensor([3, -1])
    assert [factor.shape for factor in scheduler.factors(t, x)] == [(2, 1, 1, 1)]*2
    assert scheduler.snr(t).shape == (2,)
    for ask in (scheduler.snr, lambda t: scheduler.factors(t, x), lambda t: scheduler.transition(t, t, x)):
        for wrong in (t.float(), t.int(), 3, [3]):
            with pytest.raises(TypeError, match="^t must be int64"): ask(wrong)
        for wrong in (torch.tensor(3), t[:, None]):
            with pytest.raises(ValueError, match=r"^t must be \(B,\), one time for each image, not [^{]*$"):
                ask(wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 4, 4), (3, 2, 1, 4, 4), (0, 1, 4, 4)])
def test_what_fits_is_taken(dtype, shape):
    """Points, images, videos and an empty batch are accepted in every floating type.

    The result has the same type and shape.
    """
    x, t = torch.ones(shape, dtype=dtype), torch.full(shape[:1], 9)
    for prediction_type in PREDICTION_TYPES:
        scheduler = NoiseScheduler.cosine(50, prediction_type=prediction_type)
        for method in IMAGES:
            out = getattr(scheduler, method)(x, x, t)
            first = out[0] if isinstance(out, tuple) else out
            assert (first.dtype, first.shape) == (x.dtype, x.shape)
    check_batch({"x0": x}, t=t, prev_t=t - 1)


def test_scheduler_is_no_module():
    """The scheduler has no buffers that a model could save, move or average.

    A model that carries a scheduler keeps its own buffers and modules.
    """
    model, scheduler = nn.Linear(2, 2), NoiseScheduler.linear()
    model.scheduler = scheduler
    scheduler.snr(torch.tensor([0]))                               # this fills the cached table
    assert not isinstance(scheduler, nn.Module)
    assert list(model.buffers()) == [] and set(model.state_dict()) == {"weight", "bias"}
    assert len(list(model.modules())) == 1
