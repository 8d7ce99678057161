"""Fast samplers, step by step.

They are compared with diffusers, with the formulas of the papers, and with a flow that has a closed form.
"""
import itertools
import math
from dataclasses import replace
from functools import partial

import peers
import pytest
import reference
import torch
from reference import PREDICTION_TYPES
from torch.testing import assert_close

from ddpm_tutorial.fast_sampling import ddim_invert, ddim_steps, dpm_solver_steps
from ddpm_tutorial.run.config import PRESETS, SamplingConfig
from ddpm_tutorial.run.device import new_model, sampling_steps
from ddpm_tutorial.sampler import ddpm_steps, guided, sample
from ddpm_tutorial.scheduler import NoiseScheduler, SchedulerConfig, cosine_betas, from_betas
from ddpm_tutorial.solvers import DEFAULT_STEPS, METHODS, heun_steps

T, SHAPE = 100, (4, 1, 3, 3)
even_log_snr = partial(dpm_solver_steps, spacing="log_snr")
FAST = {"ddim": ddim_steps, "ddim, eta 1": partial(ddim_steps, eta=1.), "dpm++": dpm_solver_steps,
        "heun": heun_steps}


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture
def float64():
    "New tensors are float64, including the samplers' noise."
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scheduler_of(schedule, prediction_type): return SchedulerConfig(schedule, T, prediction_type).build()


def lively(x, t):
    "A made-up model: its answers depend on place and time, and its x0 leaves [-1, 1]."
    return torch.sin(3*x + 0.05*t.view(-1, 1, 1, 1)) + 0.3*x


def run_of(method, scheduler, start, n=None, model=lively, clip_sample=False, seed=0, **kwargs):
    "Returns the steps, and the x that each of them started from."
    steps = list(method(model, scheduler, start.shape, generator=seeded(seed), noise=start,
                        num_inference_steps=n, clip_sample=clip_sample, **kwargs))
    return steps, [start] + [step.x for step in steps[:-1]]


def pairs_of(steps): return list(zip([step.t for step in steps], [step.t for step in steps[1:]] + [-1]))


@pytest.mark.parametrize("n", [7, 100])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0., 0.5, 1.])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_step_by_step(float64, schedule, prediction_type, eta, clip, n):
    """Every step agrees with diffusers in x and in x0.

    Both start each step from the same x, with the same fresh noise.
    """
    scheduler = scheduler_of(schedule, prediction_type)
    theirs = peers.diffusers_ddim(schedule, T, clip, prediction_type=prediction_type)
    start = torch.randn(SHAPE, generator=seeded(1))
    steps, started = run_of(ddim_steps, scheduler, start, n, clip_sample=clip, eta=eta)
    fresh, clipped = seeded(), 0
    for step, x, (t, prev_t) in zip(steps, started, scheduler.timesteps(n), strict=True):
        assert step.t == t
        noise = torch.randn(SHAPE, generator=fresh) if eta > 0 and prev_t >= 0 else torch.zeros(SHAPE)
        expected = peers.ddim_step(theirs, lively(x, torch.full((4,), t)), t, prev_t, x, eta, noise)
        # unclipped, x0 is in the thousands where little signal is left
        scale = max(1., expected.pred_original_sample.abs().max().item())
        assert_close(step.x, expected.prev_sample, rtol=0, atol=1e-11*scale)
        assert_close(step.x0, expected.pred_original_sample, rtol=0, atol=1e-11*scale)
        clipped += (step.x0.abs() == 1).sum().item()
    assert (clipped > 0) == clip


@pytest.mark.parametrize("spacing, n", [*(("time", n) for n in (1, 2, 3, 10, 30, 99, 100)),
                                        ("log_snr", 2), ("log_snr", 10)])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_step_by_step(float64, schedule, prediction_type, clip, spacing, n):
    """Every step from the same x agrees with diffusers at our times.

    The order is 1 at both ends and 2 in between. diffusers does not clip, so it is given our clipped x0.
    """
    scheduler, start = scheduler_of(schedule, prediction_type), torch.randn(SHAPE, generator=seeded(1))
    steps, started = run_of(dpm_solver_steps, scheduler, start, n, clip_sample=clip, spacing=spacing)
    pairs = scheduler.timesteps(n, skip_zero=spacing == "time", spacing=spacing)
    assert [step.t for step in steps] == [t for t, _ in pairs]
    assert len(steps) == n and steps[0].t == T - 1
    theirs = peers.diffusers_dpm_solver(schedule, T, [step.t for step in steps],
                                        prediction_type="sample" if clip else prediction_type)
    for step, x in zip(steps, started, strict=True):
        output = step.x0 if clip else lively(x, torch.full((4,), step.t))
        expected = theirs.step(output, step.t, x).prev_sample
        scale = max(1., x.abs().max().item(), step.x0.abs().max().item())
        assert_close(step.x, expected, rtol=0, atol=2e-6*scale)   # diffusers makes x float32 in each step


@pytest.mark.parametrize("spacing, n", [("time", 1), ("time", 2), ("time", 10), ("time", 100),
                                        ("log_snr", 10)])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_with_eta_1_step_by_step(float64, schedule, clip, spacing, n):
    "With eta 1, every step from the same x and noise is that of SDE-DPM-Solver++ in diffusers."
    scheduler, start = scheduler_of(schedule, "v_prediction"), torch.randn(SHAPE, generator=seeded(1))
    steps, started = run_of(dpm_solver_steps, scheduler, start, n, clip_sample=clip, spacing=spacing, eta=1.)
    theirs = peers.diffusers_dpm_solver(schedule, T, [step.t for step in steps], prediction_type="sample",
                                        algorithm_type="sde-dpmsolver++")
    fresh = seeded()
    for step, x, (_, prev_t) in zip(steps, started, pairs_of(steps), strict=True):
        noise = torch.randn(SHAPE, generator=fresh) if prev_t >= 0 else torch.zeros(SHAPE)
        expected = theirs.step(step.x0, step.t, x, variance_noise=noise).prev_sample
        scale = max(1., x.abs().max().item(), step.x0.abs().max().item())
        assert_close(step.x, expected, rtol=0, atol=2e-6*scale)   # diffusers makes x float32 in each step


@pytest.mark.parametrize("eta", [0., 0.4, 1.])
@pytest.mark.parametrize("path", ["linear", "cosine", "flow"])
def test_dpm_solver_and_ddim_share_their_eta(float64, path, eta):
    "If x0 stands still there is no line to follow: DPM-Solver++ is DDIM with the same eta."
    def knows_x0(x, t): return torch.full_like(x, 0.7)
    scheduler, start = scheduler_of(path, "sample"), torch.randn(SHAPE, generator=seeded(1))
    one, other = (run_of(method, scheduler, start, 9, knows_x0, eta=eta, spacing="log_snr")[0]
                  for method in (dpm_solver_steps, ddim_steps))
    for a, b in zip(one, other, strict=True): assert_close(a.x, b.x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100])
def test_times_of_dpm_solver(n):
    """The times are evenly spread from the last one to a quarter of a stride before clean data.

    Time 0 is visited only if all times are.
    """
    start = torch.randn(SHAPE, generator=seeded(1))
    steps, _ = run_of(dpm_solver_steps, NoiseScheduler.cosine(T), start, n)
    times, last = [step.t for step in steps], {1: T - 1, 2: 12, 3: 8, 10: 2, 99: 1, 100: 0}[n]
    assert times[0] == T - 1 and times[-1] == last and len(times) == n
    strides = [t - prev_t for t, prev_t in zip(times, times[1:])]
    assert not strides or max(strides) - min(strides) <= 1
    assert torch.equal(steps[-1].x, steps[-1].x0)


def even_in_log_snr(betas, n, last):
    """The times nearest to n evenly spaced values of half the log-SNR.

    They are computed one number at a time.
    """
    products = list(itertools.accumulate((1 - beta for beta in betas), lambda a, alpha: a*alpha))
    lam = [math.log(a/(1 - a))/2 for a in products]
    wanted = [lam[-1] + (lam[last] - lam[-1])*i/max(1, n - 1) for i in range(n)]
    return [min(range(len(lam)), key=lambda t: abs(lam[t] - place)) for place in wanted]


@pytest.mark.parametrize("spacing", ["time", "log_snr"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_pairs_for_every_length(schedule, spacing):
    """For every T and n there are n falling pairs, from T - 1 to clean data.

    Where the times nearest to even log-SNR all differ, the pairs visit exactly those times.
    """
    lengths = [*range(21, 34), 200] if schedule == "linear" else [1, 2, 3, *range(21, 34), 200]
    for T, skip_zero in itertools.product(lengths, (False, True)):
        scheduler, betas = SchedulerConfig(schedule, T).build(), reference.betas(schedule, T)
        for n in range(1, T + 1) if T < 200 else (5, 12, 20, 60, 199, 200):
            pairs = scheduler.timesteps(n, skip_zero, spacing)
            times = [t for t, _ in pairs]
            assert len(pairs) == n and times[0] == T - 1
            assert [prev_t for _, prev_t in pairs] == [*times[1:], -1]
            assert all(prev_t < t for t, prev_t in pairs)
            last = max(1, T//(4*n)) if skip_zero and n < T else 0
            assert n == 1 or times[-1] == last
            if spacing == "log_snr" and T in (1, 2, 30, 200):
                nearest = even_in_log_snr(betas, n, last)
                assert times == nearest or len(set(nearest)) < n


def test_no_time_is_visited_twice():
    """At either end a stride spans few times, so the nearest times repeat, but our list does not.

    Repeated times move down, or up where there is no room below.
    """
    cases = (("cosine", 500, 10, slice(0, 4), [499, 499, 498, 496], [499, 498, 497, 496]),
             ("linear", 1000, 40, slice(-4, None), [3, 1, 1, 0], [3, 2, 1, 0]))
    for schedule, T, n, places, repeated, ours in cases:
        assert even_in_log_snr(reference.betas(schedule, T), n, 0)[places] == repeated
        pairs = SchedulerConfig(schedule, T).build().timesteps(n, spacing="log_snr")
        assert [t for t, _ in pairs][places] == ours


@pytest.mark.parametrize("n", [2, 5, 10, 20, 40])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_log_snr_times_against_diffusers(schedule, n):
    """Our times are the nearest to the noise levels of diffusers with `use_lu_lambdas`.

    On the linear schedule, diffusers rounds to the same times.
    """
    scheduler = SchedulerConfig(schedule, 1000).build()
    theirs = peers.DPMSolverMultistepScheduler(1000, use_lu_lambdas=True, **peers.betas_of(schedule, 1000))
    theirs.set_timesteps(n)
    times = [t for t, _ in scheduler.timesteps(n, spacing="log_snr")]
    # with n = 40, diffusers visits time 1 twice
    if schedule == "linear" and n < 40: assert times == theirs.timesteps.tolist()
    log_sigmas = (scheduler.sigma/scheduler.signal).log()
    wanted = theirs.sigmas[:-1].double().log()
    nearest = [(log_sigmas - log_sigma).abs().argmin().item() for log_sigma in wanted]
    # nearer to the ends, our times make room for one another
    assert all(t == near for t, near in zip(times, nearest) if 5 < near < 980)


@pytest.mark.parametrize("n", [5, 18, 40])
def test_karras_times(n):
    """Away from the ends, our times are the nearest to the noise levels of diffusers' `use_karras_sigmas`.

    At the ends they make room for one another.
    """
    scheduler = SchedulerConfig("linear", 1000).build()
    theirs = peers.DPMSolverMultistepScheduler(1000, use_karras_sigmas=True, **peers.betas_of("linear", 1000))
    theirs.set_timesteps(n)
    wanted, levels = theirs.sigmas[:-1].double(), scheduler.sigma/scheduler.signal
    nearest = [(levels.log() - sigma.log()).abs().argmin().item() for sigma in wanted]
    times = [t for t, _ in scheduler.timesteps(n, spacing="karras")]
    assert times[0] == 999 and times[-1] == 0
    assert all(abs(t - near) <= 1 for t, near in zip(times, nearest) if 20 < near < 950)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 50, 1000])
def test_trailing_times_against_diffusers(n):
    "Also: all strides are alike, the last one to clean data, and half as many steps visit every other time."
    theirs = peers.DDIMScheduler(1000, timestep_spacing="trailing")
    theirs.set_timesteps(n)
    pairs = NoiseScheduler.cosine(1000).timesteps(n, spacing="trailing")
    assert [t for t, _ in pairs] == theirs.timesteps.tolist()
    assert {t - prev for t, prev in pairs} == {1000//n} and pairs[-1][1] == -1


@pytest.mark.parametrize("T", [7, 500])
def test_trailing_times_of_half_as_many_steps(T):
    "Also where the strides aren't whole: the longer list holds the shorter one."
    scheduler = NoiseScheduler.cosine(T)
    for n in (1, 2, 3):
        short, long = ([t for t, _ in scheduler.timesteps(k*n, spacing="trailing")] for k in (1, 2))
        assert long[::2] == short and short[0] == T - 1 and len(set(long)) == 2*n


def test_an_unknown_spacing():
    with pytest.raises(ValueError, match="spacing must be one of .*, not 'logSNR'"):
        NoiseScheduler.cosine(T).timesteps(5, spacing="logSNR")
    with pytest.raises(ValueError, match="spacing must be"):
        next(dpm_solver_steps(lively, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), spacing="log"))


def test_no_noise_at_the_clean_end():
    "If the log-SNR is infinite at the clean end, the path itself is refused."
    betas = cosine_betas(T)
    betas[0], betas[-1] = 1e-20, 1.
    with pytest.raises(ValueError, match=r"sigma must be in \(0, 1\]"):
        NoiseScheduler(*from_betas(betas), prediction_type="v_prediction")


@pytest.mark.parametrize("spacing", ["time", "log_snr", "karras"])
@pytest.mark.parametrize("T", [1, 2, 3, 50, 1000])
def test_spacings_without_signal_at_the_end(T, spacing):
    "With zero terminal SNR every spacing has its times, from pure noise down."
    scheduler = NoiseScheduler.flow(T)
    for n in {1, min(2, T), min(10, T), T}:
        times = [t for t, _ in scheduler.timesteps(n, spacing=spacing)]
        assert len(times) == n and times[0] == T - 1 and (n == 1 or times[-1] == 0)
        assert all(a > b for a, b in zip(times, times[1:]))
    if T == 1000 and spacing == "log_snr": # the middle of the line is in the middle
        assert abs(scheduler.timesteps(11, spacing=spacing)[5][0] - 499) < 100


def closed_form(betas, z, mean, std, t):
    "Where the flow has a point at time t if it ends z standard deviations from the mean."
    a = reference.alpha_bar(betas, t)
    return math.sqrt(a)*mean + math.sqrt(a*std**2 + 1 - a)*z


class EqualStrides(NoiseScheduler):
    "The last stride, to clean data, is as long as the strides before it."
    def timesteps(self, num_inference_steps, **options):
        *pairs, (t, _), _ = super().timesteps(num_inference_steps + 1)
        return [*pairs, (t, -1)]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("method, order, grid", [
    (ddim_steps, 1, NoiseScheduler), (dpm_solver_steps, 2, EqualStrides),
    (dpm_solver_steps, 2, NoiseScheduler), (even_log_snr, 2, NoiseScheduler)])
def test_order_of_convergence(method, order, grid, schedule, prediction_type):
    """Four times the steps divide the error by about 4 (order 1) or 16 (order 2).

    The error is measured against the closed form, for pixels of three standard deviations.
    """
    betas = reference.betas(schedule, 1000)
    scheduler = SchedulerConfig(schedule, 1000, prediction_type).build()
    scheduler = grid(scheduler.signal, scheduler.sigma, prediction_type=prediction_type)
    z, errors = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], {}
    for n in (20, 80):
        squares = []
        for std in (0.5, 1.0, 1.5):
            model = reference.gaussian_denoiser(betas, prediction_type, 0.3, std)
            steps, _ = run_of(method, scheduler, closed_form(betas, z, 0.3, std, 999), n, model)
            squares.append((steps[-1].x - closed_form(betas, z, 0.3, std, -1)).square().mean())
        errors[n] = torch.stack(squares).mean().sqrt().item()
    assert 0.75*order < math.log(errors[20]/errors[80], 4) < 1.35*order
    # Our shorter last stride has a larger error here. It keeps more detail, but Gaussian pixels have none.
    assert errors[80] < (0.05 if order == 1 else 0.003 if grid is EqualStrides else 0.007)


@pytest.mark.parametrize("schedule, spacing, errors", [
    ("linear", "time", {5: 0.1003, 10: 0.0894, 20: 0.0509, 40: 0.0192}),
    ("linear", "log_snr", {5: 0.1066, 10: 0.0425, 20: 0.0169, 40: 0.0043}),
    ("cosine", "time", {10: 0.0333, 20: 0.0165, 40: 0.0057}),
    ("cosine", "log_snr", {10: 0.0163, 20: 0.0346, 40: 0.0101})])
def test_error_of_two_spacings(schedule, spacing, errors):
    """The errors against the closed form, over seven standard deviations, agree with stored values.

    From 10 steps on, even log-SNR wins on the linear schedule. From 20 steps on, it loses on the cosine
    schedule, whose log-SNR ends far lower.
    """
    betas, scheduler = reference.betas(schedule, 1000), SchedulerConfig(schedule, 1000, "sample").build()
    start, a = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None], reference.alpha_bar(betas, 999)
    for n, expected in errors.items():
        squares = []
        for std in torch.linspace(0.3, 1.5, 7).tolist():
            model = reference.gaussian_denoiser(betas, "sample", 0.3, std)
            steps, _ = run_of(dpm_solver_steps, scheduler, start, n, model, spacing=spacing)
            z = (start - math.sqrt(a)*0.3)/math.sqrt(a*std**2 + 1 - a)
            squares.append((steps[-1].x - closed_form(betas, z, 0.3, std, -1)).square().mean())
        assert torch.stack(squares).mean().sqrt().item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", [ddim_steps, dpm_solver_steps])
def test_few_steps_are_not_worse_than_first_order(method):
    """At 5 and 10 steps, the errors stay below a limit, which is half as large for DPM-Solver++.

    Time 0 is nearly clean and far away in log-SNR. A second-order stride to it would be worse than DDIM.
    """
    betas = reference.betas("linear", 1000)
    scheduler = SchedulerConfig("linear", 1000, "v_prediction").build()
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for n, limit in ((5, 0.5), (10, 0.25)):
        model = reference.gaussian_denoiser(betas, "v_prediction", 0.3, 0.5)
        steps, _ = run_of(method, scheduler, closed_form(betas, z, 0.3, 0.5, 999), n, model)
        error = (steps[-1].x - closed_form(betas, z, 0.3, 0.5, -1)).square().mean().sqrt().item()
        assert error < (limit if method is ddim_steps else limit/2)


@pytest.mark.parametrize("n", [1, 9, 100])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_eta_1_is_ancestral_sampling(float64, schedule, clip, n):
    "With eta 1, every step is that of ancestral sampling with the same generator, in strides too."
    scheduler, start = scheduler_of(schedule, "v_prediction"), torch.randn(SHAPE, generator=seeded(1))
    ours, _ = run_of(ddim_steps, scheduler, start, n, clip_sample=clip, eta=1.)
    ancestral, _ = run_of(ddpm_steps, scheduler, start, n, clip_sample=clip)
    for step, other in zip(ours, ancestral, strict=True):
        assert step.t == other.t
        assert_close(step.x, other.x, rtol=1e-8, atol=1e-8)
        assert_close(step.x0, other.x0, rtol=1e-8, atol=1e-8)
    used = seeded(), seeded()
    sample(lively, scheduler, SHAPE, generator=used[0], method=ddim_steps, eta=1., num_inference_steps=n)
    sample(lively, scheduler, SHAPE, generator=used[1], method=ddpm_steps, num_inference_steps=n)
    # neither draws more than the other, even in the last step
    assert torch.equal(used[0].get_state(), used[1].get_state())


@pytest.mark.parametrize("eta", [0., 0.7, 1.])
def test_every_eta_keeps_the_distribution(eta):
    """Mean and variance after every step stay within 5 standard errors of those of noisy images.

    With a model that knows x0, the mean is sqrt(alpha_bar) x0 and the variance 1 - alpha_bar.
    """
    def knows_x0(x, t): return torch.full_like(x, 0.7)
    scheduler = NoiseScheduler.cosine(T, prediction_type="sample")
    x = torch.randn(64, 1, 16, 16, generator=seeded(1))
    steps = ddim_steps(knows_x0, scheduler, x.shape, generator=seeded(), noise=x, eta=eta,
                       num_inference_steps=10)
    for step, (_, prev_t) in zip(steps, scheduler.timesteps(10)):
        a = scheduler.signal[prev_t].item()**2 if prev_t >= 0 else 1.
        # 1e-3: alpha_bar is not quite 0 at the start
        assert abs(step.x.mean().item() - math.sqrt(a)*0.7) < 5*math.sqrt((1 - a)/x.numel()) + 1e-3
        assert abs(step.x.var().item() - (1 - a)) < 5*(1 - a)*math.sqrt(2/x.numel()) + 1e-6


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_out_of_range(eta):
    for method in (ddim_steps, dpm_solver_steps):
        with pytest.raises(ValueError, match="eta must be in 0 ... 1"):
            next(method(lively, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), eta=eta))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow"])
@pytest.mark.parametrize("method, order", [(ddim_steps, 1), (dpm_solver_steps, 2), (heun_steps, 2)])
def test_flow_follows_its_closed_form(method, order, prediction_type):
    """On the straight path with Gaussian data, the samples follow the closed form.

    A point that starts z standard deviations from the mean ends there too. The error falls with the order
    of the method.
    """
    scheduler, errors = NoiseScheduler.flow(1000, prediction_type), {}
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for n in (20, 80):
        squares = []
        for std in (0.5, 1.0, 1.5):
            model = reference.flow_denoiser(1000, prediction_type, 0.3, std)
            steps, _ = run_of(method, scheduler, z, n, model)
            # pure noise z ends z standard deviations from the mean
            squares.append((steps[-1].x - (0.3 + std*z)).square().mean())
        errors[n] = torch.stack(squares).mean().sqrt().item()
    assert 0.75*order < math.log(errors[20]/errors[80], 4) < 1.35*order
    assert errors[80] < {1: 0.03, 2: 0.005}[order]


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_flow_samples_have_the_moments_of_the_data(method, prediction_type):
    """Every sampler works on the straight path.

    Its 65,536 pixels have the mean of the Gaussian data and nearly the same standard deviation.
    """
    scheduler = NoiseScheduler.flow(200, prediction_type)
    model = reference.flow_denoiser(200, prediction_type, 0.3, 0.5)
    x = sample(model, scheduler, (256, 1, 16, 16), generator=seeded(), method=method, num_inference_steps=100,
               clip_sample=False)
    assert abs(x.mean().item() - 0.3) < 0.01 and abs(x.std().item() - 0.5) < 0.015


PATHS = {"linear": dict(schedule="linear"), "cosine": dict(schedule="cosine"), "flow": dict(schedule="flow"),
         "shifted cosine": dict(schedule="cosine", shift=64/28),
         "shifted flow": dict(schedule="flow", shift=3.),
         "zero terminal SNR": dict(schedule="linear", zero_terminal_snr=True)}


def moments(monkeypatch, path, steps, method):
    """Mean and standard deviation of samples, and how often noise was drawn.

    The model is the exact denoiser of N(0.3, 0.5^2).

    A sample is then a linear function of these noises. Row i of the batch is given a 1 as draw
    number i, and zeros otherwise: its distance from a row without any noise is the factor of that draw, and
    the variance is the sum of the squared factors.
    """
    scheduler = SchedulerConfig(**PATHS[path], num_steps=steps, prediction_type="v_prediction").build()
    drawn = []
    def model(x, t):
        signal, sigma = scheduler.factors(t, x)
        x0 = 0.3 + 0.25*signal/(0.25*signal**2 + sigma**2)*(x - 0.3*signal)
        return scheduler.target(x0, (x - signal*x0)/sigma, t)
    def one_at_a_time(shape, **_):
        draw = torch.zeros(shape)
        draw[len(drawn)] = 1.
        drawn.append(None)
        return draw
    random = method is ddpm_steps or isinstance(method, partial)
    monkeypatch.setattr(torch, "randn", one_at_a_time)
    x = sample(model, scheduler, (steps*random + 2, 1), generator=seeded(), method=method, clip_sample=False)
    x = x.flatten()
    factors = x[:-1] - x[-1]
    return x[-1].item(), factors.square().sum().sqrt().item(), len(drawn)


EVERY_METHOD = METHODS | {f"dpm++, eta {eta}": partial(dpm_solver_steps, eta=eta) for eta in (0.7, 1.)}


@pytest.mark.parametrize("method", EVERY_METHOD.values(), ids=EVERY_METHOD)
@pytest.mark.parametrize("path", PATHS)
def test_moments_on_every_path(monkeypatch, float64, path, method):
    """With the exact denoiser of Gaussian data, samples have its mean and standard deviation to 1e-3.

    Methods of first order need 5,000 steps for it.
    """
    steps = {ddpm_steps: 5000, ddim_steps: 5000}.get(method, 500)
    mean, std, draws = moments(monkeypatch, path, steps, method)
    assert draws == (1 if method in (ddim_steps, dpm_solver_steps, heun_steps) else steps)
    assert abs(mean - 0.3) < 1e-3 and abs(std - 0.5) < 1e-3


@pytest.mark.parametrize("eta", [0.7, 1.])
@pytest.mark.parametrize("path", ["linear", "flow"])
def test_dpm_solver_with_fresh_noise_is_of_second_order(monkeypatch, float64, path, eta):
    "With twice the steps, the standard deviation is four times closer to that of the data."
    method = partial(dpm_solver_steps, eta=eta)
    errors = [abs(moments(monkeypatch, path, n, method)[1] - 0.5) for n in (250, 500)]
    assert 3 < errors[0]/errors[1] < 6


@pytest.mark.parametrize("n", [1, 3, 10, 100])
def test_ddim_on_the_straight_path_is_eulers_step(float64, n):
    """On the straight path, a DDIM step is `x + (u' - u) v`, as in flow matching (2210.02747).

    That holds for any model.
    """
    scheduler = NoiseScheduler.flow(T)
    steps, started = run_of(ddim_steps, scheduler, torch.randn(SHAPE, generator=seeded(1)), n)
    for step, x, (t, prev_t) in zip(steps, started, scheduler.timesteps(n), strict=True):
        v, u, u_prev = lively(x, torch.full((4,), t)), (t + 1)/T, (prev_t + 1)/T
        assert_close(step.x, x + (u_prev - u)*v, rtol=0, atol=1e-12)
        assert_close(step.x0, x - u*v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_noise_to_start_from(method):
    """Given noise is what the model sees first, and none is drawn in its place.

    Noise of another shape is refused.
    """
    start, seen = torch.randn(SHAPE, generator=seeded(5)), []
    def model(x, t):
        seen.append(x)
        return x*0
    scheduler = NoiseScheduler.cosine(T)
    list(method(model, scheduler, SHAPE, generator=seeded(), noise=start, num_inference_steps=3))
    assert torch.equal(seen[0], start)
    given, drawn = (
        list(method(lively, scheduler, SHAPE, generator=seeded(), num_inference_steps=3, **kwargs))
        for kwargs in ({"noise": torch.randn(SHAPE, generator=seeded())}, {}))
    assert torch.equal(given[0].x0, drawn[0].x0)
    for shape in ((1, 1, 3, 3), (4, 1, 3), (4, 3, 1, 3)):
        with pytest.raises(ValueError, match="noise is"):
            next(method(lively, scheduler, SHAPE, generator=seeded(), noise=torch.zeros(shape)))


@pytest.mark.parametrize("method", [ddim_steps, dpm_solver_steps])
def test_no_noise_is_drawn_on_the_way(method):
    "After the first noise, nothing is drawn from the generator. The global one is never used."
    used, once = seeded(), seeded()
    before = torch.get_rng_state()
    scheduler = NoiseScheduler.cosine(T)
    x = sample(lively, scheduler, SHAPE, generator=used, method=method, num_inference_steps=9)
    start = torch.randn(SHAPE, generator=once)
    assert torch.equal(x, sample(lively, scheduler, SHAPE, generator=None, method=method,
                                 num_inference_steps=9, noise=start))
    assert torch.equal(used.get_state(), once.get_state()) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", FAST.values(), ids=FAST)
def test_same_seed_same_samples(method):
    scheduler = NoiseScheduler.cosine(T)
    once, again, other = (
        sample(lively, scheduler, SHAPE, generator=seeded(seed), method=method, num_inference_steps=9)
        for seed in (3, 3, 4))
    assert torch.equal(once, again) and not torch.equal(once, other)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("method", FAST.values(), ids=FAST)
def test_no_signal_at_all(method, prediction_type):
    """A schedule may end at alpha_bar 0.

    The samples are finite, and close to those of a schedule that ends just above 0.
    """
    betas, ends = cosine_betas(T), []
    for last in (1., 1 - 1e-12):
        betas[-1] = last
        scheduler = NoiseScheduler(*from_betas(betas), prediction_type=prediction_type)
        for n in (1, 2, 3, 10, T):
            steps, _ = run_of(method, scheduler, torch.randn(SHAPE, generator=seeded(1)), n)
            assert all(step.x.isfinite().all() and step.x0.isfinite().all() for step in steps)
            if n == 10: ends.append(steps[1].x)
    # 2M looks back over a stride in log-SNR, which is infinite in one case and 14 long in the other
    assert_close(*ends, rtol=0, atol=0.1 if method is dpm_solver_steps else 1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_inversion_is_the_flow(schedule, prediction_type):
    """Inversion leads to the noise of the closed form, and sampling leads back.

    Both come nearer with more steps. A clean image is treated as one of time 0.
    """
    betas = reference.betas(schedule, 1000)
    scheduler = SchedulerConfig(schedule, 1000, prediction_type).build()
    model = reference.gaussian_denoiser(betas, prediction_type, 0.3, 0.5)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    image, there, back = closed_form(betas, z, 0.3, 0.5, -1), {}, {}
    for n in (50, 200):
        noise = ddim_invert(model, scheduler, image, num_inference_steps=n)
        there[n] = (noise - closed_form(betas, z, 0.3, 0.5, 999)).abs().max().item()
        back[n] = (run_of(ddim_steps, scheduler, noise, n, model)[0][-1].x - image).abs().max().item()
    assert there[200] < 0.4*there[50] and there[200] < 0.1
    assert back[200] < 0.4*back[50] and back[200] < 0.03


def test_inversion_step_by_step(float64):
    """Each stride is DDIM's formula, unclipped, with the slope at the clean end of the stride.

    The model is given the time of that end, and its labels.
    """
    scheduler, calls = scheduler_of("cosine", "v_prediction"), []
    x = torch.randn(SHAPE, generator=seeded(1))
    def model(x, t, labels):
        assert labels.tolist() == [0, 1, 2, 3]
        calls.append(t.tolist())
        return lively(x, t)
    x0, noise = scheduler.to_x0_and_noise(lively(x, torch.zeros(4)), x, torch.zeros(4).long())
    one_stride = scheduler.add_noise(x0, noise, torch.full((4,), T - 1))
    assert_close(ddim_invert(lively, scheduler, x, num_inference_steps=1), one_stride, rtol=1e-9, atol=1e-9)
    found = ddim_invert(model, scheduler, x, num_inference_steps=6, labels=torch.arange(4))
    times = [t for t, _ in reversed(scheduler.timesteps(6))]
    for t, next_t in zip(times, times[1:]):
        x0, noise = scheduler.to_x0_and_noise(lively(x, torch.full((4,), t)), x, torch.full((4,), t))
        x = scheduler.add_noise(x0, noise, torch.full((4,), next_t))
    assert_close(found, x, rtol=1e-9, atol=1e-9)
    assert calls == [[t]*4 for t in times[:-1]]
    def with_gradients(x, t): return x*torch.ones(1, requires_grad=True)
    assert not ddim_invert(with_gradients, scheduler, x, num_inference_steps=6).requires_grad
    with pytest.raises(ValueError, match="needs one row for each"):
        ddim_invert(model, scheduler, x, labels=torch.zeros(1))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_arguments(method):
    """Every method takes the same arguments in the same way.

    It makes as many steps as asked for, checks conditions and hands them to the model, clips x0 and keeps
    no gradients. It refuses wrong numbers of steps.
    """
    seen = []
    def model(x, t, labels):
        seen.append((t.tolist(), labels.tolist()))
        return x*torch.ones(1, requires_grad=True)
    def run(n=5, labels=torch.arange(4)):
        return list(method(model, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), num_inference_steps=n,
                           labels=labels))
    steps = run()
    times = [step.t for step in steps]
    if method is heun_steps: times = [times[0], *(t for t in times[1:] for _ in range(2))] # the second look
    assert seen == [([t]*4, [0, 1, 2, 3]) for t in times] and len(steps) == 5
    for step in steps:
        assert step.x.shape == step.x0.shape == SHAPE
        assert not step.x.requires_grad and step.x0.abs().max() <= 1
    assert torch.equal(steps[-1].x, steps[-1].x0) or (steps[-1].x - steps[-1].x0).abs().max() < 1e-6
    assert len(run(None)) == len(run(T)) == T and len(run(1)) == 1
    for n in (0, T + 1):
        with pytest.raises(ValueError, match="num_inference_steps must be in 1 ... 100"): run(n)
    with pytest.raises(ValueError, match="there are 4 samples"): run(labels=torch.arange(3))


@pytest.mark.parametrize("method", FAST.values(), ids=FAST)
def test_another_device(method):
    """On the device `meta`, which has shapes but no numbers, everything is moved there.

    Random numbers still come from the generator of the CPU.
    """
    def model(x, t, labels):
        assert {x.device.type, t.device.type, labels.device.type} == {"meta"}
        return x
    kwargs = dict(method=method, num_inference_steps=4, labels=torch.arange(4))
    scheduler, used, once = NoiseScheduler.cosine(T), seeded(), seeded()
    x = sample(model, scheduler, SHAPE, generator=used, device="meta", **kwargs)
    assert x.device.type == "meta"
    sample(model, scheduler, SHAPE, generator=seeded(), device="meta", noise=torch.zeros(SHAPE), **kwargs)
    sample(lambda x, t, labels: x, scheduler, SHAPE, generator=once, **kwargs)
    assert torch.equal(used.get_state(), once.get_state())


def test_names():
    assert METHODS.keys() == DEFAULT_STEPS.keys() == {"ddpm", "ddim", "dpm++", "heun"}
    assert METHODS["ddpm"] is ddpm_steps and METHODS["ddim"] is ddim_steps
    assert METHODS["dpm++"] is dpm_solver_steps and METHODS["heun"] is heun_steps
    assert DEFAULT_STEPS["ddpm"] is None


@pytest.mark.parametrize("method", ["ddim", "dpm++"])
def test_eta_reaches_the_sampler(method):
    "The steps of a configuration with an eta are those of its method with this eta."
    config = replace(PRESETS["small"], sampling=SamplingConfig(method=method, eta=0.7, num_inference_steps=4))
    model, labels = new_model(config), torch.arange(2)
    *_, last = sampling_steps(model, config, 2, {"labels": labels}, generator=seeded())
    expected = sample(guided(model, 3., model.null_cond), config.scheduler.build(), (2, 1, 28, 28),
                      generator=seeded(), method=METHODS[method], num_inference_steps=4, eta=0.7,
                      labels=labels)
    assert torch.equal(last.x, expected)
