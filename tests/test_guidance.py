"""Guidance at some noise levels, and by a weaker network."""
import pytest
import torch
from torch.testing import assert_close

from ddpm_tutorial.guidance import guided_by_weaker, scale_in_interval
from ddpm_tutorial.run.config import Config, SamplingConfig
from ddpm_tutorial.sampler import guided
from ddpm_tutorial.scheduler import NoiseScheduler

NULL, SCHEDULER = {"labels": 10}, NoiseScheduler.cosine(100)
X, LABELS = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def model(x, t, labels): return torch.sin(x) + labels.view(-1, 1, 1, 1)/10 + t.view(-1, 1, 1, 1)/100


def counted(calls):
    def counting(x, t, labels):
        calls.append(len(x))
        return model(x, t, labels)
    return counting


def test_guidance_inside_the_interval_only():
    "Each image has the scale of its own time: guided inside, conditional outside."
    level = SCHEDULER.sigma/SCHEDULER.signal
    scale = scale_in_interval(SCHEDULER, 3., (0.5, 2.))
    t = torch.tensor([5, 45, 55, 95])
    inside = (level[t] > 0.5) & (level[t] <= 2)
    assert inside.tolist() == [False, True, True, False]
    found = guided(model, scale, NULL)(X, t, labels=LABELS)
    strong, plain = (guided(model, s, NULL)(X, t, labels=LABELS) for s in (3., 1.))
    assert_close(found, torch.where(inside.view(-1, 1, 1, 1), strong, plain))


def test_outside_the_interval_the_model_is_called_once():
    calls = []
    wrapped = guided(counted(calls), scale_in_interval(SCHEDULER, 3., (0.5, 2.)), NULL)
    for t in (5, 50, 95): wrapped(X, torch.full((4,), t), labels=LABELS)
    assert calls == [4, 8, 4]


@pytest.mark.parametrize("interval", [(1., 1.), (2., 1.), (-1., 1.), (1., float("inf")), (), (1., 2., 3.)])
def test_intervals_that_cannot_be(interval):
    with pytest.raises(ValueError, match="guidance_interval must be two rising, finite numbers from 0"):
        scale_in_interval(SCHEDULER, 2., interval)
    with pytest.raises(ValueError, match="guidance_interval must be two rising"):
        SamplingConfig(guidance_interval=interval)


def test_an_interval_without_a_time():
    "It is refused where the path is known, and the message names the levels that the path has."
    with pytest.raises(ValueError, match=r"\(1000000.0, 10000000.0\) holds no time of this path, whose"):
        scale_in_interval(SCHEDULER, 2., (1e6, 1e7))
    with pytest.raises(ValueError, match="holds no time of this path"):
        Config(sampling=SamplingConfig(guidance_interval=(1e6, 1e7)))
    # without any signal at the end, the last time counts as if the levels went on
    scale = scale_in_interval(NoiseScheduler.flow(100), 2., (0., 1e6))
    assert (scale(torch.arange(100)) == 2).all()


def test_the_whole_axis_is_plain_guidance():
    scale = scale_in_interval(SCHEDULER, 2.5, (0., 1e9))
    t = torch.tensor([0, 30, 60, 99])
    found, plain = (guided(model, s, NULL)(X, t, labels=LABELS) for s in (scale, 2.5))
    assert torch.equal(found, plain)


def test_away_from_a_weaker_model():
    "Weaker + s (model - weaker), with the same conditions; at scale 1 the weaker one is not called."
    def weaker(x, t, labels): return model(x, t, labels)*0.5
    t = torch.full((4,), 7)
    strong = model(X, t, LABELS)
    assert_close(guided_by_weaker(model, weaker, 2.)(X, t, labels=LABELS), 0.5*strong + 2*0.5*strong)
    calls = []
    assert torch.equal(guided_by_weaker(model, counted(calls), 1.)(X, t, labels=LABELS), strong) and not calls
    with pytest.raises(ValueError, match="the model's output is"):
        guided_by_weaker(model, lambda x, t, labels: x[:, 0], 2.)(X, t, labels=LABELS)
