"""Progressive distillation: where a step ends, what the student is asked for, and what a student refuses."""
import re
from dataclasses import asdict, replace

import peers
import pytest
import reference
import torch
from torch.testing import assert_close

from ddpm_tutorial.distillation import distillation_objective, x0_of_step
from ddpm_tutorial.fast_sampling import ddim_steps
from ddpm_tutorial.run.config import Config, SamplingConfig, config_from_dict
from ddpm_tutorial.sampler import guided, sample
from ddpm_tutorial.scheduler import NoiseScheduler, SchedulerConfig
from ddpm_tutorial.training import TrainConfig, new_state, train_steps

T = 1000
SHAPE = (6, 1, 3, 3)


def lively(x, t, **cond):
    "A made-up network: its answers depend on place and time."
    return torch.sin(3*x + 0.05*t.view(-1, *[1]*(x.ndim - 1)).to(x)) + 0.3*x


def zeros(x, t, **cond): return torch.zeros_like(x)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_where_a_step_ends(schedule):
    "The answer leads one DDIM step of the sampler itself from x_t to x_s, clean data included."
    scheduler = SchedulerConfig(schedule, 100, "sample").build()
    generator = torch.Generator().manual_seed(0)
    x_t, x_s = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    for n in (1, 2, 4):
        (first, then), *_ = scheduler.timesteps(n, spacing="trailing")
        t, s = torch.full((6,), first), torch.full((6,), then)
        answer = x0_of_step(scheduler, x_t, x_s, t, s)
        step = next(ddim_steps(lambda x, t: answer, scheduler, SHAPE, generator=generator, noise=x_t,
                               clip_sample=False, num_inference_steps=n, spacing="trailing"))
        assert step.t == first
        assert_close(step.x, x_s, rtol=1e-9, atol=1e-9)


def test_each_image_has_its_own_step():
    scheduler = NoiseScheduler.cosine(100, prediction_type="sample")
    x_t, x_s = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([99, 50, 20]), torch.tensor([10, -1, 19])
    together = x0_of_step(scheduler, x_t, x_s, t, s)
    alone = [x0_of_step(scheduler, x_t[[i]], x_s[[i]], t[[i]], s[[i]]) for i in range(3)]
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps, teacher_steps", [(1, 2), (4, 2), (2, 5)])
def test_the_target_against_diffusers(steps, teacher_steps, clip):
    """The teacher's steps are those of diffusers' DDIM with trailing times.

    A student that answers zeros has the mean square of the target as its loss. The target follows from where
    diffusers ends, in numbers.
    """
    scheduler = NoiseScheduler.cosine(T, prediction_type="v_prediction")
    theirs = peers.DDIMScheduler(T, clip_sample=clip, prediction_type="v_prediction",
                                 timestep_spacing="trailing", set_alpha_to_one=True,
                                 **peers.betas_of("cosine", T))
    theirs.alphas_cumprod = peers.exact_products("cosine", T)
    theirs.set_timesteps(steps*teacher_steps)
    times, betas = [*theirs.timesteps.tolist(), -1], reference.betas("cosine", T)
    objective = distillation_objective(lively, scheduler, steps, teacher_steps, clip_sample=clip)
    x0 = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))*2 - 1
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        losses, level = objective(zeros, x0, {}, generator)
        generator = torch.Generator().manual_seed(seed)       # the draws of the objective, again
        first = teacher_steps*torch.randint(steps, (6,), generator=generator)
        noise = torch.randn(SHAPE, generator=generator)
        for i in range(6):
            t, s = times[first[i]], times[first[i] + teacher_steps]
            assert abs(level[i].item() - t/T) < 1e-12
            a, a_s = (reference.alpha_bar(betas, k) if k >= 0 else 1. for k in (t, s))
            x_t = x = a**0.5*x0[i:i + 1] + (1 - a)**0.5*noise[i:i + 1]
            for now in times[first[i]:first[i] + teacher_steps]:
                prediction = lively(x, torch.tensor([now]))
                x = theirs.step(prediction, now, x, use_clipped_model_output=clip).prev_sample
            ratio = ((1 - a_s)/(1 - a))**0.5
            wanted = (x - ratio*x_t)/(a_s**0.5 - ratio*a**0.5)
            v = (a**0.5*x_t - wanted)/(1 - a)**0.5            # of the velocity that belongs to it
            assert_close(losses[i].double(), v.square().mean(), rtol=1e-4, atol=1e-5)


def test_a_student_learns_a_teacher_of_two_steps():
    """Distilled on Gaussian data, where a linear student can do all that its teacher does.

    Afterwards one step of the student ends where two steps of the teacher end, from the same noise.
    """
    scheduler, mean, std = NoiseScheduler.flow(100), 0.4, 0.3

    def teacher(x, t):
        signal, sigma = (factor.to(x) for factor in scheduler.factors(t, x))
        x0 = mean + signal*std**2/(signal**2*std**2 + sigma**2)*(x - signal*mean)
        return (x - x0)/sigma                                  # noise - x0, for u = sigma and signal = 1 - u

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.shift = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))

        def forward(self, x, t):
            which = (t > 60).long()                            # the student's two times are 99 and 49
            return self.slope[which, None]*x + self.shift[which, None]

    class Pixels:
        x0 = mean + std*torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
        def __len__(self): return len(self.x0)
        def batch(self, index, device): return self.x0[index], {}

    config = TrainConfig(epochs=30, batch_size=200, lr=0.05, lr_decay=True)
    state = new_state(Line(), config)
    objective = distillation_objective(teacher, scheduler, 2, clip_sample=False)
    for _ in train_steps(state, Pixels(), objective, config): pass
    noise = torch.linspace(-2, 2, 9)[:, None]
    ends = {name: sample(model, scheduler, (9, 1), generator=torch.Generator(), method=ddim_steps,
                         noise=noise, num_inference_steps=n, spacing="trailing", clip_sample=False)
            for name, model, n in (("teacher", teacher, 4), ("student", state.ema, 2), ("early", teacher, 2))}
    assert_close(ends["student"], ends["teacher"], rtol=0, atol=0.01)
    assert (ends["early"] - ends["teacher"]).abs().max() > 0.02   # the teacher in two steps ends elsewhere


def test_a_guided_teacher_and_its_conditions():
    "The teacher gets the images' labels; the student is asked once, without dropped labels."
    scheduler, calls = NoiseScheduler.cosine(100, prediction_type="v_prediction"), []

    def network(x, t, labels):
        calls.append(("teacher", labels.tolist()))
        return lively(x, t) + labels.view(-1, 1, 1, 1)/10

    def student(x, t, labels):
        calls.append(("student", labels.tolist()))
        return zeros(x, t)

    objective = distillation_objective(guided(network, 2., {"labels": 10}), scheduler, 4)
    x0, labels = torch.zeros(SHAPE), torch.arange(6)
    objective(student, x0, {"labels": labels}, torch.Generator().manual_seed(0))
    both = [10]*6 + labels.tolist()
    assert calls == [("teacher", both), ("teacher", both), ("student", labels.tolist())]


def test_no_gradient_reaches_the_teacher():
    teacher, student = (torch.nn.Conv2d(1, 1, 1) for _ in range(2))
    scheduler = NoiseScheduler.cosine(100, prediction_type="v_prediction")
    objective = distillation_objective(lambda x, t: teacher(x), scheduler, 2)
    losses, _ = objective(lambda x, t: student(x), torch.zeros(SHAPE), {}, torch.Generator().manual_seed(0))
    losses.mean().backward()
    assert teacher.weight.grad is None and student.weight.grad is not None


def test_more_steps_than_times():
    with pytest.raises(ValueError, match="must be in 1 ... 10, not 12"):
        distillation_objective(lively, NoiseScheduler.cosine(10, prediction_type="sample"), 6)


STUDENT = SamplingConfig(method="ddim", spacing="trailing", guidance_scale=1., num_inference_steps=4)


@pytest.mark.parametrize("changes, named", [
    (dict(num_inference_steps=2), "num_inference_steps=2"),     # its steps would be half as long as they must
    (dict(num_inference_steps=8), "num_inference_steps=8"),
    (dict(num_inference_steps=None), "num_inference_steps=None"),
    (dict(method="dpm++"), "method='dpm++'"), (dict(spacing="time"), "spacing='time'"),
    (dict(guidance_scale=2.), "guidance_scale=2.0"),
    (dict(guidance_interval=(0.3, 3.)), "guidance_interval=(0.3, 3.0)"), (dict(eta=0.5), "eta=0.5")])
def test_what_a_student_refuses(changes, named):
    "It knows its own times only, and its guidance is inside."
    with pytest.raises(ValueError, match=f"student .* for num_inference_steps=4 .*{re.escape(named)}"):
        Config(student_steps=4, sampling=replace(STUDENT, **changes))


def test_what_a_student_takes():
    "Its own number of steps. The configuration survives JSON, and older ones have no such field."
    config = Config(student_steps=4, sampling=STUDENT)
    assert config_from_dict(asdict(config)) == config
    old = asdict(config)
    del old["student_steps"]
    assert config_from_dict(old).student_steps is None
