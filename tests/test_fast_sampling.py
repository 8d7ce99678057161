"""Fast samplers: step by step against diffusers and the papers' formulas, and against a flow that is known in closed form."""
import itertools
import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import peers
import reference
from ddpm_tutorial.fast_sampling import DEFAULT_STEPS, METHODS, ddim_invert, ddim_steps, dpm_solver_steps
from ddpm_tutorial.sampler import ddpm_steps, sample
from ddpm_tutorial.scheduler import NoiseScheduler, SchedulerConfig, cosine_betas, from_betas

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")    # those that diffusers has for these paths
T, SHAPE = 100, (4, 1, 3, 3)
even_log_snr = partial(dpm_solver_steps, spacing="log_snr")
FAST = {"ddim": ddim_steps, "ddim, eta 1": partial(ddim_steps, eta=1.), "dpm++": dpm_solver_steps}


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture
def float64():
    "New tensors are float64, the samplers' noise too."
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scheduler_of(schedule, prediction_type): return SchedulerConfig(schedule, T, prediction_type).build()


def lively(x, t):
    "A model without sense, whose answers depend on place and time, and whose x0 leaves [-1, 1]."
    return torch.sin(3*x + 0.05*t.view(-1, 1, 1, 1)) + 0.3*x


def run_of(method, scheduler, start, n=None, model=lively, clip_sample=False, seed=0, **kwargs):
    "The steps, and the x that each of them started from."
    steps = list(method(model, scheduler, start.shape, generator=seeded(seed), noise=start, num_inference_steps=n, clip_sample=clip_sample,
                        **kwargs))
    return steps, [start] + [step.x for step in steps[:-1]]


def pairs_of(steps): return list(zip([step.t for step in steps], [step.t for step in steps[1:]] + [-1]))


@pytest.mark.parametrize("n", [7, 100])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0., 0.5, 1.])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_step_by_step(float64, schedule, prediction_type, eta, clip, n):
    "Every step from the same x as diffusers, with the same fresh noise; x0 as well."
    scheduler, theirs = scheduler_of(schedule, prediction_type), peers.diffusers_ddim(schedule, T, clip, prediction_type=prediction_type)
    steps, started = run_of(ddim_steps, scheduler, torch.randn(SHAPE, generator=seeded(1)), n, clip_sample=clip, eta=eta)
    fresh, clipped = seeded(), 0
    for step, x, (t, prev_t) in zip(steps, started, scheduler.timesteps(n), strict=True):
        assert step.t == t
        noise = torch.randn(SHAPE, generator=fresh) if eta > 0 and prev_t >= 0 else torch.zeros(SHAPE)
        expected = peers.ddim_step(theirs, lively(x, torch.full((4,), t)), t, prev_t, x, eta, noise)
        scale = max(1., expected.pred_original_sample.abs().max().item())       # unclipped, it is thousands where little signal is left
        assert_close(step.x, expected.prev_sample, rtol=0, atol=1e-11*scale)
        assert_close(step.x0, expected.pred_original_sample, rtol=0, atol=1e-11*scale)
        clipped += (step.x0.abs() == 1).sum().item()
    assert (clipped > 0) == clip


@pytest.mark.parametrize("spacing, n", [*(("time", n) for n in (1, 2, 3, 10, 30, 99, 100)), ("log_snr", 2), ("log_snr", 10)])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_step_by_step(float64, schedule, prediction_type, clip, spacing, n):
    "Every step from the same x as diffusers with our times: first order at both ends, second between. It does not clip: it gets our x0."
    scheduler = scheduler_of(schedule, prediction_type)
    steps, started = run_of(dpm_solver_steps, scheduler, torch.randn(SHAPE, generator=seeded(1)), n, clip_sample=clip, spacing=spacing)
    assert [step.t for step in steps] == [t for t, _ in scheduler.timesteps(n, skip_zero=spacing == "time", spacing=spacing)]
    assert len(steps) == n and steps[0].t == T - 1
    theirs = peers.diffusers_dpm_solver(schedule, T, [step.t for step in steps], prediction_type="sample" if clip else prediction_type)
    for step, x in zip(steps, started, strict=True):
        output = step.x0 if clip else lively(x, torch.full((4,), step.t))
        expected = theirs.step(output, step.t, x).prev_sample
        scale = max(1., x.abs().max().item(), step.x0.abs().max().item())
        assert_close(step.x, expected, rtol=0, atol=2e-6*scale)                 # diffusers makes x float32 in each step


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100])
def test_times_of_dpm_solver(n):
    "Evenly spread from the last time to one a quarter of a stride from clean data; time 0 is visited only if all are."
    steps, _ = run_of(dpm_solver_steps, NoiseScheduler.cosine(T), torch.randn(SHAPE, generator=seeded(1)), n)
    times, last = [step.t for step in steps], {1: T - 1, 2: 12, 3: 8, 10: 2, 99: 1, 100: 0}[n]
    assert times[0] == T - 1 and times[-1] == last and len(times) == n
    strides = [t - prev_t for t, prev_t in zip(times, times[1:])]
    assert not strides or max(strides) - min(strides) <= 1
    assert torch.equal(steps[-1].x, steps[-1].x0)


def even_in_log_snr(betas, n, last):
    "For each of n equal strides in the half log of the signal-to-noise ratio, the time that is nearest: one number at a time."
    products = list(itertools.accumulate((1 - beta for beta in betas), lambda a, alpha: a*alpha))
    lam = [math.log(a/(1 - a))/2 for a in products]
    wanted = [lam[-1] + (lam[last] - lam[-1])*i/max(1, n - 1) for i in range(n)]
    return [min(range(len(lam)), key=lambda t: abs(lam[t] - place)) for place in wanted]


@pytest.mark.parametrize("spacing", ["time", "log_snr"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_pairs_for_every_length(schedule, spacing):
    "For all T and n: n pairs that fall, from T-1 to clean data; where the nearest times in log-SNR all differ, they are those."
    lengths = [*range(21, 34), 200] if schedule == "linear" else [1, 2, 3, *range(21, 34), 200]
    for T, skip_zero in itertools.product(lengths, (False, True)):
        scheduler, betas = SchedulerConfig(schedule, T).build(), reference.betas(schedule, T)
        for n in range(1, T + 1) if T < 200 else (5, 12, 20, 60, 199, 200):
            pairs = scheduler.timesteps(n, skip_zero, spacing)
            times = [t for t, _ in pairs]
            assert len(pairs) == n and times[0] == T - 1 and [prev_t for _, prev_t in pairs] == [*times[1:], -1]
            assert all(prev_t < t for t, prev_t in pairs)
            last = max(1, T//(4*n)) if skip_zero and n < T else 0
            assert n == 1 or times[-1] == last
            if spacing == "log_snr" and T in (1, 2, 30, 200):
                nearest = even_in_log_snr(betas, n, last)
                assert times == nearest or len(set(nearest)) < n


def test_no_time_is_visited_twice():
    "There are few times in a stride at either end: the nearest ones repeat, the list does not. Downwards, or upwards where there is no room."
    for schedule, T, n, places, repeated, ours in (("cosine", 500, 10, slice(0, 4), [499, 499, 498, 496], [499, 498, 497, 496]),
                                                   ("linear", 1000, 40, slice(-4, None), [3, 1, 1, 0], [3, 2, 1, 0])):
        assert even_in_log_snr(reference.betas(schedule, T), n, 0)[places] == repeated
        assert [t for t, _ in SchedulerConfig(schedule, T).build().timesteps(n, spacing="log_snr")][places] == ours


@pytest.mark.parametrize("n", [2, 5, 10, 20, 40])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_log_snr_times_against_diffusers(schedule, n):
    "`use_lu_lambdas`: the same noise levels, ours at the nearest time; on the linear schedule it rounds as ours does."
    scheduler = SchedulerConfig(schedule, 1000).build()
    theirs = peers.DPMSolverMultistepScheduler(1000, use_lu_lambdas=True, **peers.betas_of(schedule, 1000))
    theirs.set_timesteps(n)
    times = [t for t, _ in scheduler.timesteps(n, spacing="log_snr")]
    if schedule == "linear" and n < 40: assert times == theirs.timesteps.tolist()         # with 40 it visits time 1 twice
    log_sigmas = (scheduler.sigma/scheduler.signal).log()
    nearest = [(log_sigmas - log_sigma).abs().argmin().item() for log_sigma in theirs.sigmas[:-1].double().log()]
    assert all(t == near for t, near in zip(times, nearest) if 5 < near < 980)            # beyond, ours give way to one another


def test_spacings_that_cannot_be():
    "A name that is unknown, and a log-SNR that is infinite at the noisy end; at the clean end it is no path at all."
    with pytest.raises(ValueError, match="spacing must be 'time' or 'log_snr', not 'logSNR'"): NoiseScheduler.cosine(T).timesteps(5, spacing="logSNR")
    with pytest.raises(ValueError, match="spacing must be"):
        next(dpm_solver_steps(lively, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), spacing="log"))
    betas = cosine_betas(T)
    betas[-1] = 1.
    terminal = NoiseScheduler(*from_betas(betas), prediction_type="v_prediction")
    with pytest.raises(ValueError, match="spacing 'log_snr' needs"): terminal.timesteps(5, spacing="log_snr")
    assert len(terminal.timesteps(5)) == 5
    betas[0] = 1e-20
    with pytest.raises(ValueError, match=r"sigma must be in \(0, 1\]"): NoiseScheduler(*from_betas(betas), prediction_type="v_prediction")


def closed_form(betas, z, mean, std, t):
    "Where the flow has a point at time t that ends z standard deviations from the mean."
    a = reference.alpha_bar(betas, t)
    return math.sqrt(a)*mean + math.sqrt(a*std**2 + 1 - a)*z


class EqualStrides(NoiseScheduler):
    "The last leap, to clean data, is as long as the strides before it."
    def timesteps(self, num_inference_steps, **kwargs):
        *pairs, (t, _), _ = super().timesteps(num_inference_steps + 1)
        return [*pairs, (t, -1)]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("method, order, grid", [(ddim_steps, 1, NoiseScheduler), (dpm_solver_steps, 2, EqualStrides),
                                                 (dpm_solver_steps, 2, NoiseScheduler), (even_log_snr, 2, NoiseScheduler)])
def test_order_of_convergence(method, order, grid, schedule, prediction_type):
    "Against the closed form, for pixels of three spreads: with four times the steps the error is divided by 4 or by 16, about."
    betas, scheduler = reference.betas(schedule, 1000), SchedulerConfig(schedule, 1000, prediction_type).build()
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
    assert errors[80] < (0.05 if order == 1 else 0.003 if grid is EqualStrides else 0.007)   # a nearer last leap keeps more detail, which bell curves have not


@pytest.mark.parametrize("schedule, spacing, errors", [
    ("linear", "time", {5: 0.1003, 10: 0.0894, 20: 0.0509, 40: 0.0192}), ("linear", "log_snr", {5: 0.1066, 10: 0.0425, 20: 0.0169, 40: 0.0043}),
    ("cosine", "time", {10: 0.0333, 20: 0.0165, 40: 0.0057}), ("cosine", "log_snr", {10: 0.0163, 20: 0.0346, 40: 0.0101})])
def test_error_of_two_spacings(schedule, spacing, errors):
    "Against the closed form, seven spreads: even log-SNR wins on the linear schedule, and loses on the cosine one, which ends far below."
    betas, scheduler = reference.betas(schedule, 1000), SchedulerConfig(schedule, 1000, "sample").build()
    start, a = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None], reference.alpha_bar(betas, 999)
    for n, expected in errors.items():
        squares = []
        for std in torch.linspace(0.3, 1.5, 7).tolist():
            steps, _ = run_of(dpm_solver_steps, scheduler, start, n, reference.gaussian_denoiser(betas, "sample", 0.3, std), spacing=spacing)
            z = (start - math.sqrt(a)*0.3)/math.sqrt(a*std**2 + 1 - a)
            squares.append((steps[-1].x - closed_form(betas, z, 0.3, std, -1)).square().mean())
        assert torch.stack(squares).mean().sqrt().item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", [ddim_steps, dpm_solver_steps])
def test_few_steps_are_not_worse_than_first_order(method):
    "At 5 and 10 steps. A second-order stride to time 0, nearly clean and far away in log-SNR, would be worse than DDIM."
    betas, scheduler = reference.betas("linear", 1000), SchedulerConfig("linear", 1000, "v_prediction").build()
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
    "Step by step with the same generator, in strides as well."
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
    assert torch.equal(used[0].get_state(), used[1].get_state())                # nothing more is drawn, in the last step neither


@pytest.mark.parametrize("eta", [0., 0.7, 1.])
def test_every_eta_keeps_the_distribution(eta):
    "With a model that knows x0, x has mean sqrt(alpha_bar) x0 and variance 1 - alpha_bar after every step, within 5 standard errors."
    scheduler = NoiseScheduler.cosine(T, prediction_type="sample")
    x = torch.randn(64, 1, 16, 16, generator=seeded(1))
    for step, (_, prev_t) in zip(ddim_steps(lambda x, t: torch.full_like(x, 0.7), scheduler, x.shape, generator=seeded(), noise=x, eta=eta,
                                            num_inference_steps=10), scheduler.timesteps(10)):
        a = scheduler.signal[prev_t].item()**2 if prev_t >= 0 else 1.
        assert abs(step.x.mean().item() - math.sqrt(a)*0.7) < 5*math.sqrt((1 - a)/x.numel()) + 1e-3     # alpha_bar at the start is not 0
        assert abs(step.x.var().item() - (1 - a)) < 5*(1 - a)*math.sqrt(2/x.numel()) + 1e-6


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_out_of_range(eta):
    with pytest.raises(ValueError, match="eta must be in 0 ... 1"):
        next(ddim_steps(lively, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), eta=eta))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow"])
@pytest.mark.parametrize("method, order", [(ddim_steps, 1), (dpm_solver_steps, 2)])
def test_flow_follows_its_closed_form(method, order, prediction_type):
    "On the straight path, Gaussian data: each point keeps its place in the crowd, and the error falls as the order says."
    scheduler, z, errors = NoiseScheduler.flow(1000, prediction_type), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], {}
    for n in (20, 80):
        squares = []
        for std in (0.5, 1.0, 1.5):
            steps, _ = run_of(method, scheduler, z, n, reference.flow_denoiser(1000, prediction_type, 0.3, std))
            squares.append((steps[-1].x - (0.3 + std*z)).square().mean())       # pure noise z ends z standard deviations from the mean
        errors[n] = torch.stack(squares).mean().sqrt().item()
    assert 0.75*order < math.log(errors[20]/errors[80], 4) < 1.35*order
    assert errors[80] < {1: 0.03, 2: 0.005}[order]


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_flow_samples_have_the_moments_of_the_data(method, prediction_type):
    "Every sampler serves the straight path: 65,536 pixels have the mean of Gaussian data, and about its width."
    scheduler, model = NoiseScheduler.flow(200, prediction_type), reference.flow_denoiser(200, prediction_type, 0.3, 0.5)
    x = sample(model, scheduler, (256, 1, 16, 16), generator=seeded(), method=method, num_inference_steps=100, clip_sample=False)
    assert abs(x.mean().item() - 0.3) < 0.01 and abs(x.std().item() - 0.5) < 0.015


@pytest.mark.parametrize("n", [1, 3, 10, 100])
def test_ddim_on_the_straight_path_is_eulers_step(float64, n):
    "Whatever the model says: x + (u' - u) v, as in flow matching (2210.02747)."
    scheduler = NoiseScheduler.flow(T)
    steps, started = run_of(ddim_steps, scheduler, torch.randn(SHAPE, generator=seeded(1)), n)
    for step, x, (t, prev_t) in zip(steps, started, scheduler.timesteps(n), strict=True):
        v, u, u_prev = lively(x, torch.full((4,), t)), (t + 1)/T, (prev_t + 1)/T
        assert_close(step.x, x + (u_prev - u)*v, rtol=0, atol=1e-12)
        assert_close(step.x0, x - u*v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_noise_to_start_from(method):
    "The model sees it first, nothing is drawn in its place; noise of another shape is refused."
    start, seen = torch.randn(SHAPE, generator=seeded(5)), []
    def model(x, t):
        seen.append(x)
        return x*0
    list(method(model, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), noise=start, num_inference_steps=3))
    assert torch.equal(seen[0], start)
    given, drawn = (list(method(lively, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), num_inference_steps=3, **kwargs))
                    for kwargs in ({"noise": torch.randn(SHAPE, generator=seeded())}, {}))
    assert torch.equal(given[0].x0, drawn[0].x0)
    for shape in ((1, 1, 3, 3), (4, 1, 3), (4, 3, 1, 3)):
        with pytest.raises(ValueError, match="noise is"):
            next(method(lively, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), noise=torch.zeros(shape)))


@pytest.mark.parametrize("method", [ddim_steps, dpm_solver_steps])
def test_no_noise_is_drawn_on_the_way(method):
    "After the first noise the generator stands still; and the global one is not used at all."
    used, once = seeded(), seeded()
    before = torch.get_rng_state()
    x = sample(lively, NoiseScheduler.cosine(T), SHAPE, generator=used, method=method, num_inference_steps=9)
    assert torch.equal(x, sample(lively, NoiseScheduler.cosine(T), SHAPE, generator=None, method=method, num_inference_steps=9,
                                 noise=torch.randn(SHAPE, generator=once)))
    assert torch.equal(used.get_state(), once.get_state()) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", FAST.values(), ids=FAST)
def test_same_seed_same_samples(method):
    once, again, other = (sample(lively, NoiseScheduler.cosine(T), SHAPE, generator=seeded(seed), method=method, num_inference_steps=9)
                          for seed in (3, 3, 4))
    assert torch.equal(once, again) and not torch.equal(once, other)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("method", FAST.values(), ids=FAST)
def test_no_signal_at_all(method, prediction_type):
    "A schedule that ends at alpha_bar 0: finite, and nearly what one gives that ends just above."
    betas, ends = cosine_betas(T), []
    for last in (1., 1 - 1e-12):
        betas[-1] = last
        scheduler = NoiseScheduler(*from_betas(betas), prediction_type=prediction_type)
        for n in (1, 2, 3, 10, T):
            steps, _ = run_of(method, scheduler, torch.randn(SHAPE, generator=seeded(1)), n)
            assert all(step.x.isfinite().all() and step.x0.isfinite().all() for step in steps)
            if n == 10: ends.append(steps[1].x)
    assert_close(*ends, rtol=0, atol=0.1 if method is dpm_solver_steps else 1e-4)   # 2M looks back over a stride: infinite, or 14 long


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_inversion_is_the_flow(schedule, prediction_type):
    "To the noise that the closed form says, the nearer the more steps; and back again. A clean image counts as one of time 0."
    betas, scheduler = reference.betas(schedule, 1000), SchedulerConfig(schedule, 1000, prediction_type).build()
    model, z = reference.gaussian_denoiser(betas, prediction_type, 0.3, 0.5), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    image, there, back = closed_form(betas, z, 0.3, 0.5, -1), {}, {}
    for n in (50, 200):
        noise = ddim_invert(model, scheduler, image, num_inference_steps=n)
        there[n] = (noise - closed_form(betas, z, 0.3, 0.5, 999)).abs().max().item()
        back[n] = (run_of(ddim_steps, scheduler, noise, n, model)[0][-1].x - image).abs().max().item()
    assert there[200] < 0.4*there[50] and there[200] < 0.1
    assert back[200] < 0.4*back[50] and back[200] < 0.03


def test_inversion_step_by_step(float64):
    "Each stride is DDIM's formula with the slope at its clean end, unclipped; the model is told that time, and its labels."
    scheduler, x, calls = scheduler_of("cosine", "v_prediction"), torch.randn(SHAPE, generator=seeded(1)), []
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
    assert not ddim_invert(lambda x, t: x*torch.ones(1, requires_grad=True), scheduler, x, num_inference_steps=6).requires_grad
    with pytest.raises(ValueError, match="needs one row for each"): ddim_invert(model, scheduler, x, labels=torch.zeros(1))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_arguments(method):
    "Of every method: as many steps as asked for, conditions checked and handed on, clipped, no gradients, bad numbers of steps refused."
    seen = []
    def model(x, t, labels):
        seen.append((t.tolist(), labels.tolist()))
        return x*torch.ones(1, requires_grad=True)
    def run(n=5, labels=torch.arange(4)):
        return list(method(model, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), num_inference_steps=n, labels=labels))
    steps = run()
    assert seen == [([step.t]*4, [0, 1, 2, 3]) for step in steps] and len(steps) == 5
    assert all(step.x.shape == step.x0.shape == SHAPE and not step.x.requires_grad and step.x0.abs().max() <= 1 for step in steps)
    assert torch.equal(steps[-1].x, steps[-1].x0) or (steps[-1].x - steps[-1].x0).abs().max() < 1e-6
    assert len(run(None)) == len(run(T)) == T and len(run(1)) == 1
    for n in (0, T + 1):
        with pytest.raises(ValueError, match="num_inference_steps must be in 1 ... 100"): run(n)
    with pytest.raises(ValueError, match="there are 4 samples"): run(labels=torch.arange(3))


@pytest.mark.parametrize("method", FAST.values(), ids=FAST)
def test_another_device(method):
    "On `meta`, which has shapes and no numbers: everything is moved there, and chance still comes from the CPU's generator."
    def model(x, t, labels):
        assert {x.device.type, t.device.type, labels.device.type} == {"meta"}
        return x
    kwargs = dict(method=method, num_inference_steps=4, labels=torch.arange(4))
    used, once = seeded(), seeded()
    assert sample(model, NoiseScheduler.cosine(T), SHAPE, generator=used, device="meta", **kwargs).device.type == "meta"
    sample(model, NoiseScheduler.cosine(T), SHAPE, generator=seeded(), device="meta", noise=torch.zeros(SHAPE), **kwargs)
    sample(lambda x, t, labels: x, NoiseScheduler.cosine(T), SHAPE, generator=once, **kwargs)
    assert torch.equal(used.get_state(), once.get_state())


def test_names():
    assert METHODS.keys() == DEFAULT_STEPS.keys() == {"ddpm", "ddim", "dpm++"}
    assert METHODS["ddpm"] is ddpm_steps and METHODS["ddim"] is ddim_steps and METHODS["dpm++"] is dpm_solver_steps
    assert DEFAULT_STEPS["ddpm"] is None
