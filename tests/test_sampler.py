"""Sampling, compared with an exact recursion for a known best denoiser, and guidance with labels."""
import io
import math

import numpy as np
import pytest
import reference
import torch
from peers import randomised
from reference import PREDICTION_TYPES
from torch.testing import assert_close

from ddpm_tutorial.sampler import (
    Step,
    ddpm_steps,
    guided,
    initial_noise,
    predict,
    predict_x0,
    prepare_conditions,
    sample,
    save_gif,
    snapshots,
)
from ddpm_tutorial.scheduler import VARIANCE_TYPES, NoiseScheduler, SchedulerConfig
from ddpm_tutorial.unet import UNet, UNetConfig

MEAN, STD = 1.5, 0.5                # of the pixels that we draw: outside [-1, 1] on purpose
SHAPE = (4, 1, 8, 8)
LABELS = torch.tensor([0, 1, 2, 3])


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def small_unet(num_classes=10):
    return randomised(UNet(UNetConfig(image_size=8, num_classes=num_classes, base_channels=8,
                                      channel_multipliers=(1, 1), attention_resolutions=(), head_dim=8,
                                      num_groups=4)))


class Recorder:
    "A model that records the labels of each call, and checks that each image has a time and a label."
    def __init__(self, model): self.model, self.calls = model, []

    def __call__(self, x, t, labels=None):
        assert len(x) == len(t) and (labels is None or len(labels) == len(x))
        self.calls.append(None if labels is None else labels.tolist())
        return self.model(x, t, labels)


@pytest.mark.parametrize("n", [100, 8])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_moments_of_the_samples(schedule, prediction_type, variance_type, n):
    """After every step, the mean and variance of 16,384 pixels agree with the exact recursion.

    They may differ by 5 standard errors.
    """
    scheduler = SchedulerConfig(schedule, 100, prediction_type, variance_type).build()
    betas = reference.betas(schedule, 100)
    model = reference.gaussian_denoiser(betas, prediction_type, MEAN, STD)
    expected = reference.ancestral_moments(betas, scheduler.timesteps(n), variance_type, MEAN, STD)
    steps = ddpm_steps(model, scheduler, (256, 1, 8, 8), generator=seeded(1), num_inference_steps=n,
                       clip_sample=False)
    for step, (mean, variance) in zip(steps, expected, strict=True):
        pixels, count = step.x.double(), step.x.numel()
        # 1e-4: float32
        assert abs(pixels.mean().item() - mean) < 5*math.sqrt(variance/count) + 1e-4
        assert abs(pixels.var().item() - variance) < 5*variance*math.sqrt(2/(count - 1)) + 1e-4


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_steps_come_nearer_to_the_data(schedule, variance_type):
    """As T grows, the recursion itself approaches the moments of the data.

    Each doubling nearly halves the error, which ends below 2 percent.
    """
    errors = []
    for T in (125, 250, 500, 1000):
        betas, pairs = reference.betas(schedule, T), [(t, t - 1) for t in reversed(range(T))]
        assert NoiseScheduler.cosine(T).timesteps() == pairs
        mean, variance = reference.ancestral_moments(betas, pairs, variance_type, MEAN, STD)[-1]
        errors.append(max(abs(mean - MEAN)/STD, abs(variance/STD**2 - 1)))
    assert all(later < 0.6*earlier for earlier, later in zip(errors, errors[1:])) and errors[-1] < 0.02


def test_steps_are_what_they_say():
    """There is one step for each pair of times, and `sample` returns the last x.

    x0 is clipped only on request.
    """
    # with this variance the last step has one too, but must not use it
    scheduler = NoiseScheduler.linear(50, variance_type="fixed_large")
    model = reference.gaussian_denoiser(reference.betas("linear", 50), "epsilon", MEAN, STD)
    for clip in (True, False):
        steps = list(ddpm_steps(model, scheduler, SHAPE, generator=seeded(), num_inference_steps=10,
                                clip_sample=clip))
        assert [step.t for step in steps] == [t for t, _ in scheduler.timesteps(10)]
        assert all(step.x.shape == step.x0.shape == SHAPE for step in steps)
        assert (max(step.x0.max() for step in steps) <= 1) == clip
        assert_close(steps[-1].x, steps[-1].x0, rtol=0, atol=1e-6)     # the last step adds no noise
        last = sample(model, scheduler, SHAPE, generator=seeded(), num_inference_steps=10, clip_sample=clip)
        assert torch.equal(last, steps[-1].x)


def test_sample_takes_a_method():
    """A method is any generator of steps. It gets all the arguments, and its last x is the result.

    The default method is ancestral sampling.
    """
    def method(model, scheduler, shape, **kwargs):
        for k in range(3): yield Step(2 - k, torch.full(shape, float(k)), None)
        seen.append((model, scheduler, kwargs))
    seen, model, scheduler, generator = [], small_unet(), NoiseScheduler.cosine(5), seeded()
    x = sample(model, scheduler, SHAPE, generator=generator, method=method, clip_sample=False, labels=LABELS)
    assert torch.equal(x, torch.full(SHAPE, 2.))
    assert seen == [(model, scheduler, {"generator": generator, "clip_sample": False, "labels": LABELS})]
    assert torch.equal(sample(model, scheduler, SHAPE, generator=seeded(), labels=LABELS),
                       sample(model, scheduler, SHAPE, generator=seeded(), labels=LABELS, method=ddpm_steps))


def test_first_noise():
    """Given noise is used and nothing is drawn.

    Noise of another shape is refused, even if it could be broadcast.
    """
    given, draws = torch.randn(SHAPE, generator=seeded()), []
    def draw():
        draws.append(given + 1)
        return draws[-1]
    assert initial_noise(given, SHAPE, draw) is given and draws == []
    assert initial_noise(None, SHAPE, draw) is draws[0] and len(draws) == 1
    for shape in ((1, 1, 8, 8), (4, 1, 8), (4, 8, 8, 1)):
        with pytest.raises(ValueError, match=r"but the samples are to be \(4, 1, 8, 8\)"):
            initial_noise(torch.zeros(shape), SHAPE, draw)


def test_start_from_given_noise():
    "Given noise leads to the same samples as if it had been drawn, and it is not changed."
    model, scheduler = small_unet(), NoiseScheduler.cosine(20)
    generator = seeded()
    given = torch.randn(SHAPE, generator=generator)
    copy = given.clone()
    x = sample(model, scheduler, SHAPE, generator=generator, noise=given, labels=LABELS)
    assert torch.equal(x, sample(model, scheduler, SHAPE, generator=seeded(), labels=LABELS))
    assert torch.equal(given, copy)
    with pytest.raises(ValueError, match="noise is"):
        sample(model, scheduler, SHAPE, generator=seeded(), noise=given[:1], labels=LABELS)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_imagine(prediction_type):
    """`predict_x0` converts the output to x0 in the type of x, and clips it if asked to.

    The model gets its conditions and one time for each image.
    """
    scheduler = NoiseScheduler.cosine(20, prediction_type=prediction_type)
    x, t = 3*torch.randn(SHAPE, generator=seeded()), torch.full((4,), 7)
    def model(x, t, labels):
        assert t.tolist() == [7]*4 and labels is LABELS
        return torch.sin(x).bfloat16()
    expected, _ = scheduler.to_x0_and_noise(torch.sin(x).bfloat16().float(), x, t)
    for clip in (False, True):
        x0 = predict_x0(model, scheduler, x, t, clip, {"labels": LABELS})
        assert x0.dtype == torch.float32 and torch.equal(x0, expected.clamp(-1, 1) if clip else expected)
    # otherwise there would be nothing to clip
    if prediction_type != "sample": assert expected.abs().max() > 1


def test_model_is_told_its_time():
    "The model gets the current time as whole numbers, one for each image."
    seen = []
    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)
    scheduler = NoiseScheduler.cosine(20)
    sample(model, scheduler, SHAPE, generator=seeded())
    assert torch.equal(torch.stack(seen), torch.arange(19, -1, -1)[:, None].expand(20, 4))
    assert seen[0].dtype == torch.int64


def test_same_seed_same_samples():
    """The samples depend on the given generator, not on the global one.

    Every image has its own noise.
    """
    model, scheduler, draws = small_unet(), NoiseScheduler.cosine(20, prediction_type="v_prediction"), []
    for seed, elsewhere in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(elsewhere)
        draws.append(sample(model, scheduler, SHAPE, generator=seeded(seed), labels=LABELS*0))
        assert torch.initial_seed() == elsewhere
        assert torch.equal(torch.rand(3), torch.rand(3, generator=seeded(elsewhere)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert (draws[0][0] - draws[0][1]).abs().max() > 0.1


def test_sampling_needs_no_gradients():
    """Neither x nor x0 carries gradients.

    Between the steps, the caller's own gradient setting is left alone.
    """
    weight = torch.ones(1, requires_grad=True)
    for step in ddpm_steps(lambda x, t: weight*x, NoiseScheduler.cosine(5), SHAPE, generator=seeded()):
        assert not step.x.requires_grad and not step.x0.requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("scale", [0., 0.5, 1., 3., -1.])
def test_guidance_is_its_formula(scale):
    """The result is the unconditional prediction plus scale times the difference.

    Scale 1 gives exactly the conditional prediction, and scale 0 exactly the unconditional one.
    """
    model, x, t = small_unet(), torch.randn(SHAPE, generator=seeded()), torch.tensor([0, 10, 500, 999])
    cond, uncond = model(x, t, LABELS), model(x, t, torch.full((4,), 10))
    assert (cond - uncond).abs().max() > 0.1
    out = guided(model, scale, {"labels": 10})(x, t, labels=LABELS)
    if scale in (0, 1): assert torch.equal(out, {0: uncond, 1: cond}[scale])
    else: assert_close(out, (1 - scale)*uncond + scale*cond, rtol=0, atol=1e-5)   # float32, in another order


def test_guidance_calls_the_model_once():
    "The model gets one batch of both halves, or only the half that is needed."
    x, t = torch.zeros(SHAPE), torch.zeros(4, dtype=torch.long)
    for scale, expected in ((0., [[10]*4]), (1., [LABELS.tolist()]), (2., [[10]*4 + LABELS.tolist()])):
        model = Recorder(small_unet())
        guided(model, scale, {"labels": 10})(x, t, labels=LABELS)
        assert model.calls == expected


def test_guidance_with_two_conditions():
    "Each condition has its own null value, which may be a vector. Each image keeps its own conditions."
    seen = {}
    def model(x, t, labels, text):
        seen.update(labels=labels, text=text)
        return x*0
    text = torch.arange(8.).view(4, 2)
    guided_model = guided(model, 2., {"labels": 10, "text": torch.tensor([-1., -2.])})
    guided_model(torch.zeros(SHAPE), LABELS, labels=LABELS, text=text)
    assert seen["labels"].tolist() == [10]*4 + LABELS.tolist()
    assert torch.equal(seen["text"], torch.cat([torch.tensor([[-1., -2.]]).expand(4, 2), text]))


@pytest.mark.parametrize("scale", [0., 1., 2.])
def test_guidance_without_labels_is_refused(scale):
    """Labels are required at every scale, for a direct call and for a sampler.

    A condition that `null` does not name is refused too.
    """
    model = guided(small_unet(), scale, {"labels": 10})
    with pytest.raises(ValueError, match=r"the conditions \['labels'\] are needed"):
        model(torch.zeros(SHAPE), LABELS)
    with pytest.raises(ValueError, match=r"the conditions \['labels'\] are needed"):
        sample(model, NoiseScheduler.cosine(5), SHAPE, generator=seeded())
    with pytest.raises(ValueError, match=r"the conditions \['labels'\] are needed"):
        model(torch.zeros(SHAPE), LABELS, labels=LABELS, text=LABELS)


def test_unconditional_model_refuses_labels():
    """An unconditional model does not silently drop labels, with guidance or without.

    A misspelt condition is an error too.
    """
    model, scheduler = small_unet(num_classes=0), NoiseScheduler.cosine(5)
    for one in (model, guided(model, 2., {"labels": 0})):
        with pytest.raises(ValueError, match="knows no classes"):
            sample(one, scheduler, SHAPE, generator=seeded(), labels=LABELS)
    with pytest.raises(TypeError, match="label"):
        sample(small_unet(), scheduler, SHAPE, generator=seeded(), label=LABELS)


@pytest.mark.parametrize("scale, matters", [(None, True), (1., True), (3., True), (0., False)])
def test_label_changes_the_samples(scale, matters):
    """If one label changes but the noise does not, only the image with that label changes.

    At scale 0 no image changes.
    """
    model, scheduler = small_unet(), NoiseScheduler.cosine(10, prediction_type="v_prediction")
    if scale is not None: model = guided(model, scale, {"labels": 10})
    one, other = (sample(model, scheduler, SHAPE, generator=seeded(), labels=labels)
                  for labels in (LABELS, torch.tensor([0, 1, 2, 9])))
    changed = (one - other).flatten(1).abs().amax(dim=1)
    assert (changed[:3] < 1e-5).all() and (changed[3] > 1e-2) == matters


WRONG_OUTPUTS = {"twice the channels": lambda x: torch.cat([x, x], dim=1), "one image": lambda x: x[:1],
                 "one row of pixels": lambda x: x[:, :, :1], "whole numbers": lambda x: x.long(),
                 "a pair": lambda x: (x, x)}

@pytest.mark.parametrize("output", WRONG_OUTPUTS.values(), ids=WRONG_OUTPUTS)
def test_output_of_another_kind_is_refused(output):
    """A sampler refuses a wrong output, and so does guidance at any scale.

    Neither broadcasts nor rounds it. The message names the shape that is wanted.
    """
    scheduler, x = NoiseScheduler.cosine(5), torch.randn(SHAPE, generator=seeded())
    t = torch.zeros(4, dtype=torch.long)
    def model(x, t, labels=None): return output(x)
    calls = [lambda: predict(model, x, t, {}), lambda: predict_x0(model, scheduler, x, t, True, {}),
             lambda: sample(model, scheduler, SHAPE, generator=seeded()),
             *(lambda scale=scale: guided(model, scale, {"labels": 10})(x, t, labels=LABELS)
               for scale in (0., 1., 2.))]
    message = r"the model's output is .*must be floating point \([48], 1, 8, 8\)"
    for call in calls:
        with pytest.raises(ValueError, match=message): call()


def test_half_precision_output_is_taken():
    "Any floating-point output is accepted, and keeps its type."
    x, t = torch.randn(SHAPE, generator=seeded()), torch.zeros(4, dtype=torch.long)
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        def model(x, t): return x.to(kind)
        assert predict(model, x, t, {}).dtype == kind


@pytest.mark.parametrize("shape", [4, (), (4., 1, 8, 8), ("4", 1), (0, 1, 8, 8), (4, -1, 8, 8), None],
                         ids=str)
def test_shape_must_be_whole_numbers(shape):
    """A shape is made of whole numbers from 1, in a tuple, a list or a `torch.Size`.

    Sampling, conditions and given noise all check it.
    """
    calls = (lambda: sample(small_unet(0), NoiseScheduler.cosine(5), shape, generator=seeded()),
             lambda: prepare_conditions({}, shape, "cpu"),
             lambda: initial_noise(torch.zeros(SHAPE), shape, None))
    for call in calls:
        with pytest.raises(ValueError, match="shape must be whole numbers"): call()
    for right in (SHAPE, list(SHAPE), torch.Size(SHAPE), tuple(np.array(SHAPE))):
        assert prepare_conditions({}, right, "cpu") == {}


def test_noise_must_be_floating_point():
    """Noise of whole numbers is refused, because the samples would be whole numbers too.

    A numpy array is refused as well.
    """
    noises = (torch.zeros(SHAPE, dtype=torch.long), torch.zeros(SHAPE, dtype=torch.uint8), np.zeros(SHAPE))
    for noise in noises:
        with pytest.raises(TypeError, match="noise must be floating point"):
            sample(lambda x, t: x*0, NoiseScheduler.cosine(5), SHAPE, generator=seeded(), noise=noise)


@pytest.mark.parametrize("scale", [0., 1., 2.])
def test_guidance_needs_a_row_for_each_sample(scale):
    """A direct call of the guided model refuses one label for four images.

    It also refuses labels that are no tensor.
    """
    model = guided(small_unet(), scale, {"labels": 10})
    x, t = torch.zeros(SHAPE), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="there are 4 samples"): model(x, t, labels=LABELS[:1])
    for labels in (3, [0, 1, 2, 3], None):
        with pytest.raises(ValueError, match="labels must be a tensor, one row for each sample"):
            model(x, t, labels=labels)


def test_snapshots_counts_in_whole_numbers():
    def steps(): return (Step(t, torch.tensor(t), None) for t in range(10))
    assert snapshots(steps(), 10, 5).tolist() == [1, 3, 5, 7, 9]
    for wrong in (0, 11, 2.5, "3"):
        with pytest.raises(ValueError, match="num_snapshots must be in 1 ... 10, a whole number"):
            snapshots(steps(), 10, wrong)


def test_gif_frames_of_another_kind_are_refused():
    """Arrays, floats, and an empty sequence of frames are refused.

    So are channels that a GIF cannot show: of four channels, one would be dropped.
    """
    save_gif(io.BytesIO(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    for frames in (np.zeros((2, 1, 8, 8), dtype=np.uint8), torch.zeros(2, 1, 8, 8)):
        with pytest.raises(TypeError, match="a tensor of uint8 frames"): save_gif(io.BytesIO(), frames)
    for shape in ((2, 4, 8, 8), (2, 2, 8, 8), (2, 8, 8), (0, 1, 8, 8)):
        with pytest.raises(ValueError, match="frames must be"):
            save_gif(io.BytesIO(), torch.zeros(shape, dtype=torch.uint8))
