"""Training: the loss, the average, the random draws, and a run that resumes as if it had never stopped."""
import copy
import io
import math
import weakref
from dataclasses import replace

import pytest
import torch
from peers import randomised
from torch import nn
from torch.testing import assert_close

from ddpm_tutorial.data import batches, load_sample
from ddpm_tutorial.likelihood import hybrid_objective
from ddpm_tutorial.scheduler import PREDICTION_TYPES, NoiseScheduler
from ddpm_tutorial.training import (
    Stream,
    TrainConfig,
    diffusion_loss,
    diffusion_objective,
    drop_conditions,
    ema_decay,
    find_gradient,
    learning_rate,
    new_state,
    random_generator,
    total_steps,
    train_steps,
    update_ema,
    validation_loss,
)
from ddpm_tutorial.unet import UNet, UNetConfig

FEW = load_sample()[torch.arange(0, 1000, 20)]                      # 50 images: batches of 20, 20 and 10
TINY = UNetConfig(base_channels=8, channel_multipliers=(1, 1), patch_size=4, attention_resolutions=(),
                  head_dim=8, num_groups=4)
CONFIG = TrainConfig(epochs=2, batch_size=20, lr=1e-3, lr_decay=True, label_dropout=0.5, weight_decay=0.01)
SCHEDULER = NoiseScheduler.cosine(50, prediction_type="v_prediction")


def fresh_state(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return new_state(UNet(TINY), config)


def objective(config): return diffusion_objective(SCHEDULER, config.label_dropout)


def everything(state):
    "All numbers of a state, as a list of tensors."
    memory = [value for parameter in state.optimizer.state.values() for value in parameter.values()]
    return [*state.model.state_dict().values(), *state.ema.state_dict().values(), *memory]


def same(one, other): return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_is_its_formula(prediction_type):
    """The loss of an image is the mean squared error against the target over its pixels.

    The model is given x_t, t and the labels.
    """
    scheduler = NoiseScheduler.cosine(50, prediction_type=prediction_type)
    t = torch.tensor([0, 20, 49])
    x0, noise = (torch.randn(3, 2, 4, 4, generator=random_generator(seed), dtype=torch.float64)
                 for seed in (0, 1))
    a = (scheduler.signal**2)[t].view(3, 1, 1, 1)
    x_t = a**0.5*x0 + (1 - a)**0.5*noise
    velocity = a**0.5*noise - (1 - a)**0.5*x0
    targets = {"epsilon": noise, "sample": x0, "v_prediction": velocity, "flow": noise - x0}
    target = targets[prediction_type]
    def model(x, times, labels):
        assert_close(x, x_t, rtol=0, atol=1e-12)
        assert torch.equal(times, t) and labels == "given"
        return 0.5*x
    losses = diffusion_loss(model, scheduler, x0, t=t, noise=noise, labels="given")
    expected = [sum((0.5*x_t[i] - target[i]).flatten().tolist()[j]**2 for j in range(32))/32
                for i in range(3)]
    # the prediction is float32
    assert_close(losses.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def drop_labels(labels, probability, generator):
    return drop_conditions({"labels": labels}, {"labels": 10}, probability, generator)["labels"]


def test_drop_conditions():
    """The dropped share is within 5 binomial standard deviations, and the seed decides which labels go.

    The other labels stay as they were. Probability 0 drops none.
    """
    labels = torch.arange(10).repeat(1000)
    for probability in (0.1, 0.5):
        dropped = drop_labels(labels, probability, random_generator(0))
        gone = dropped == 10
        assert abs(gone.sum().item() - 10_000*probability) < 5*math.sqrt(10_000*probability*(1 - probability))
        assert torch.equal(dropped[~gone], labels[~gone])
        assert gone.view(-1, 10).sum(dim=0).min() > 0                # every class
        assert torch.equal(dropped, drop_labels(labels, probability, random_generator(0)))
        assert not torch.equal(dropped, drop_labels(labels, probability, random_generator(1)))
    assert torch.equal(drop_labels(labels, 0., random_generator(0)), labels)
    assert labels.max() == 9                                        # the caller's labels are not written to


def test_all_conditions_of_an_image_are_dropped_together():
    """An image loses its label and its context of three vectors together.

    What is dropped becomes the null row.
    """
    cond = {"labels": torch.arange(10).repeat(20),
            "context": torch.rand(200, 3, 4, generator=random_generator(1))}
    null = {"labels": 10, "context": torch.full((3, 4), -1.)}
    dropped = drop_conditions(cond, null, 0.3, random_generator(0))
    gone = dropped["labels"] == 10
    assert 30 < gone.sum() < 90 and torch.equal(gone, (dropped["context"] == -1).all(dim=(1, 2)))
    assert torch.equal(dropped["context"][~gone], cond["context"][~gone])
    assert drop_conditions({}, {}, 0.3, random_generator(0)) == {}
    message = r"the conditions \['context', 'labels'\] are needed, but \['labels'\] were given"
    with pytest.raises(ValueError, match=message):
        drop_conditions({"labels": cond["labels"]}, null, 0.3, random_generator(0))
    message = r"context must be torch.float32 \(B, 3, 4\), not torch.float32 \(200, 2, 4\)"
    with pytest.raises(ValueError, match=message):
        drop_conditions(cond | {"context": cond["context"][:, :2]}, null, 0.3, random_generator(0))


def test_a_new_objective_is_one_function():
    """A new objective takes ten lines, and the training loop stays the same.

    This one is an autoencoder with one hidden layer.
    """
    def reconstruction(model, x0, cond, generator):
        noisy = x0 + 0.1*torch.randn(x0.shape, generator=generator)
        losses = (model(noisy) - x0).abs().flatten(1).mean(dim=1)
        return losses, torch.zeros(len(x0))
    config = TrainConfig(epochs=30, batch_size=25, lr=1e-2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
    state = new_state(model, config)
    losses = [record.loss for record in train_steps(state, FEW, reconstruction, config)]
    assert len(losses) == 60 and losses[-1] < 0.5*losses[0]


def test_a_new_data_set_needs_a_length_and_a_batch():
    """A new data set takes ten lines, for training and for validation.

    This one has points in the plane, each with a number as its condition.
    """
    class Points:
        x0 = torch.randn(60, 2, generator=random_generator(0))
        angle = torch.rand(60, 1, generator=random_generator(1))
        def __len__(self): return 60
        def batch(self, index, device):
            return self.x0[index].to(device), {"angle": self.angle[index].to(device)}
    class Model(nn.Module):
        null_cond = {"angle": torch.zeros(1)}
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)
        def forward(self, x, t, angle): return self.layer(torch.cat([x, t[:, None]/50, angle], dim=1))
    config = TrainConfig(epochs=40, batch_size=30, lr=1e-2, label_dropout=0.5)
    state, data = new_state(Model(), config), Points()
    before = validation_loss(state.model, data, SCHEDULER)
    for _ in train_steps(state, data, objective(config), config): pass
    assert validation_loss(state.ema, data, SCHEDULER) < 0.9*before


@pytest.mark.parametrize("dropout", [0., 0.3])
def test_label_dropout_in_the_loop(dropout):
    "In training, the model sees the images' own labels or the null label, at the given rate."
    config = TrainConfig(epochs=30, batch_size=50, label_dropout=dropout)
    state, shown = fresh_state(config=config), []
    def record(module, args, kwargs): shown.append(kwargs["labels"])
    state.model.register_forward_pre_hook(record, with_kwargs=True)
    for _ in train_steps(state, FEW, objective(config), config): pass
    shown = torch.stack(shown)                                      # (steps, images)
    n, null = shown.numel(), shown == 10
    assert abs(null.sum().item() - n*dropout) <= 5*math.sqrt(n*dropout*(1 - dropout))
    for epoch, labels in enumerate(shown):
        _, expected = next(batches(FEW, 50, generator=random_generator(0, 0, epoch)))
        assert torch.equal(labels[labels < 10], expected["labels"][labels < 10])
    fresh = fresh_state(config=config)
    untouched = torch.equal(state.model.class_embedding.weight[10], fresh.model.class_embedding.weight[10])
    assert untouched == (dropout == 0)


def test_random_generator_depends_on_its_numbers_alone():
    """The same numbers give the same draws, and other numbers give other draws.

    The same numbers in another order count as other numbers.
    """
    def draw(*numbers): return torch.rand(4, generator=random_generator(*numbers))
    torch.manual_seed(5)
    first = draw(1, 2)
    torch.manual_seed(6)
    assert torch.equal(first, draw(1, 2))
    others = [draw(2, 1), draw(1, 3), draw(1, 2, 1), draw(12), draw(0, 2)]
    assert all((first - other).abs().max() > 1e-3 for other in others)


def test_ema_is_its_closed_form():
    "In float64, the average is `d^k start + (1 - d) sum d^(k - i) weight_i`."
    toy = nn.Linear(3, 2).double()
    average, start, decay, history = copy.deepcopy(toy), toy.weight.detach().clone(), 0.8, []
    for step in range(12):
        nn.init.normal_(toy.weight, generator=random_generator(step))
        history.append(toy.weight.detach().clone())
        update_ema(average, toy, decay)
    expected = decay**12*start + (1 - decay)*sum(decay**(11 - i)*weight for i, weight in enumerate(history))
    assert_close(average.weight.detach(), expected, rtol=0, atol=1e-14)
    assert torch.equal(toy.weight, history[-1])                      # the model itself does not change


def test_buffers_are_not_averaged():
    "Buffers are copied bit for bit, because an average of two counters would mean nothing."
    toy = nn.BatchNorm1d(2)
    toy.register_buffer("table", torch.tensor([1/3, 1e-8]))
    average = copy.deepcopy(toy)
    for step in range(5):
        toy(torch.randn(8, 2, generator=random_generator(step)))
        update_ema(average, toy, 0.9)
        assert average.num_batches_tracked.item() == step + 1
        assert all(torch.equal(a, b) for a, b in zip(average.buffers(), toy.buffers(), strict=True))


def test_ema_decay_warms_up():
    """The decay starts at 1/10, never falls and ends at `longest`.

    After k steps, 1/C(k + 9, 9) of the start is left.
    """
    decays = [ema_decay(step, 0.999) for step in range(20_000)]
    assert decays[0] == 0.1 and decays[-1] == 0.999
    assert all(a <= b for a, b in zip(decays, decays[1:]))
    assert decays.index(0.999) == 8990                              # (1 + k)/(10 + k) = 0.999
    for k in (1, 10, 100, 1000):
        assert math.isclose(math.prod(decays[:k]), 1/math.comb(k + 9, 9), rel_tol=1e-12)
    assert ema_decay(0, 0.) == 0 and ema_decay(10**9) == 0.999


def test_average_in_the_loop():
    "After each step, the average includes the weights of that step, with the warmed-up decay."
    state = fresh_state()
    expected = {name: weight.clone() for name, weight in state.ema.state_dict().items()}
    for record in train_steps(state, FEW, objective(CONFIG), CONFIG):
        decay = min(0.999, record.step/(9 + record.step))           # counted from 1 here
        for name, weight in state.model.state_dict().items():
            expected[name] = decay*expected[name] + (1 - decay)*weight
        for name, weight in state.ema.state_dict().items():
            assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in state.ema.parameters()) and not state.ema.training


def test_first_step_is_adamw_by_hand():
    """One step is algorithm 1 written out: plain AdamW on the clipped gradient of the mean loss.

    Its random draws depend on seed and step.
    """
    config = TrainConfig(epochs=1, batch_size=50, lr=1e-3, weight_decay=0.1, label_dropout=0., grad_clip=0.01,
                         seed=3)
    state, mine = fresh_state(config=config), fresh_state(config=config).model
    record = next(train_steps(state, FEW, objective(config), config))
    x0, cond = next(batches(FEW, 50, generator=random_generator(3, 0, 0)))
    generator = random_generator(3, 1, 0)
    t, noise = torch.randint(50, (50,), generator=generator), torch.randn(x0.shape, generator=generator)
    assert torch.equal(record.level, t.double()/50) and len(set(t.tolist())) > 10
    losses = diffusion_loss(mine, SCHEDULER, x0, t=t, noise=noise, **cond)
    losses.mean().backward()
    length = sum(p.grad.square().sum() for p in mine.parameters() if p.grad is not None).sqrt()
    assert length > config.grad_clip
    assert_close(record.losses, losses.detach(), rtol=1e-6, atol=0)
    assert math.isclose(record.loss, losses.mean().item(), rel_tol=1e-6)
    assert math.isclose(record.grad_norm, length.item(), rel_tol=1e-5)
    for before, after in zip(mine.parameters(), state.model.parameters()):
        gradient = before.grad*0.01/length
        assert_close(after, before*(1 - 1e-3*0.1) - 1e-3*gradient/(gradient.abs() + 1e-8), rtol=0, atol=2e-5)


def test_another_callable_may_compute():
    """Another callable can make the predictions, for example a wrapper of the network.

    The state's own weights and average are trained, and the run is the same.
    """
    config = TrainConfig(epochs=2, batch_size=25)
    plain, other, calls = fresh_state(config=config), fresh_state(config=config), []
    def through(*args, **cond):
        calls.append(len(args[0]))
        return other.model(*args, **cond)
    through.null_cond = other.model.null_cond
    for _ in train_steps(plain, FEW, objective(config), config): pass
    for _ in train_steps(other, FEW, objective(config), config, model=through): pass
    assert calls == [25]*4
    for one, two in ((plain.model, other.model), (plain.ema, other.ema)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_each_image_once_an_epoch():
    """Every image is used once in an epoch, in batches of the given size.

    `max_steps` ends the run earlier.
    """
    config = TrainConfig(epochs=2, batch_size=20)
    records = list(train_steps(fresh_state(config=config), FEW, objective(config), config))
    expected = [(1, 0, 20), (2, 0, 20), (3, 0, 10), (4, 1, 20), (5, 1, 20), (6, 1, 10)]
    assert [(r.step, r.epoch, len(r.losses)) for r in records] == expected
    assert total_steps(config, 50) == 6
    for max_steps in (4, 100):
        config = TrainConfig(epochs=2, batch_size=20, max_steps=max_steps)
        records = list(train_steps(fresh_state(config=config), FEW, objective(config), config))
        assert len(records) == total_steps(config, 50) == min(6, max_steps)


def test_learning_rate():
    """The rate rises in a straight line, then stays constant or falls along half a cosine to 0.

    The training loop uses this rate.
    """
    config = TrainConfig(lr=1e-3, warmup_steps=4, lr_decay=True)
    rates = [learning_rate(step, config, 104) for step in range(105)]
    assert_close(torch.tensor(rates[:5]), torch.tensor([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3]))
    assert all(math.isclose(rates[4 + k], 1e-3*math.cos(math.pi*k/200)**2, abs_tol=1e-12) for k in range(101))
    assert learning_rate(10**6, TrainConfig(lr=1e-3, warmup_steps=4), 104) == 1e-3
    state = fresh_state()
    config = TrainConfig(epochs=2, batch_size=20, lr=1e-3, warmup_steps=2, lr_decay=True)
    for record in train_steps(state, FEW, objective(config), config):
        assert record.lr == state.optimizer.param_groups[0]["lr"] == learning_rate(record.step - 1, config, 6)


def test_the_loss_falls():
    """Forty steps on ten images bring the loss well below that of a network that predicts 0.

    We saw it fall from 0.82 to 0.53. The average improves as well.
    """
    config = TrainConfig(epochs=40, batch_size=10, lr=1e-2)
    data = load_sample()[torch.arange(0, 1000, 100)]
    state = fresh_state(config=config)
    before = validation_loss(state.model, data, SCHEDULER)
    for _ in train_steps(state, data, objective(config), config): pass
    for model in (state.model, state.ema): assert validation_loss(model, data, SCHEDULER) < 0.75*before


def cut_and_go_on(k):
    """Trains k steps, saves to bytes, loads them into another network and trains on.

    Returns the state and its records.
    """
    first = fresh_state()
    for record in train_steps(first, FEW, objective(CONFIG), CONFIG):
        if record.step == k: break
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (first.model, first.ema, first.optimizer)], file)
    file.seek(0)
    second = fresh_state(seed=1)
    parts = (second.model, second.ema, second.optimizer)
    for part, values in zip(parts, torch.load(file, weights_only=True)): part.load_state_dict(values)
    second.step = k
    torch.manual_seed(k)                                            # something else may have drawn numbers
    return second, list(train_steps(second, FEW, objective(CONFIG), CONFIG))


def test_resumed_run_equals_the_unbroken_one():
    """A run can stop after any step, also at the end of an epoch (step 3), and resume.

    Losses, times, weights, average and optimizer are the same bit for bit.
    """
    def numbers(record): return record.step, record.epoch, record.loss, record.lr, record.grad_norm
    unbroken = fresh_state()
    records = list(train_steps(unbroken, FEW, objective(CONFIG), CONFIG))
    # every step has its own draws
    assert len({tuple(record.level[:10].tolist()) for record in records}) == 6
    for k in (1, 2, 3, 4, 5):
        resumed, rest = cut_and_go_on(k)
        assert [numbers(record) for record in rest] == [numbers(record) for record in records[k:]]
        assert all(torch.equal(a.level, b.level) and torch.equal(a.losses, b.losses)
                   for a, b in zip(rest, records[k:]))
        assert resumed.step == unbroken.step == 6 and same(everything(resumed), everything(unbroken))


def test_seed_decides_the_run():
    "Another seed is another run, even from the same weights."
    losses = []
    for seed in (0, 0, 1):
        config = TrainConfig(batch_size=20, seed=seed)
        losses.append(next(train_steps(fresh_state(), FEW, objective(CONFIG), config)).loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_loss_stops_before_the_step(bad):
    """After two good steps we break a weight, and the error names the third step.

    Nothing but that weight has changed.
    """
    state = fresh_state()
    steps = train_steps(state, FEW, objective(CONFIG), CONFIG)
    next(steps)
    next(steps)
    nn.init.constant_(state.model.conv_out.bias, bad)
    before = copy.deepcopy(everything(state))
    with pytest.raises(FloatingPointError, match="at step 3"): next(steps)
    assert state.step == 2
    for now, then in zip(everything(state), before, strict=True):
        assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))
    assert all(parameter.isfinite().all() for parameter in state.ema.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradient_stops_before_the_step(bad):
    "The loss is finite, but a gradient is NaN or infinite, and the run stops before the step."
    state = fresh_state()
    steps = train_steps(state, FEW, objective(CONFIG), CONFIG)
    next(steps)
    before = copy.deepcopy(everything(state))
    state.model.conv_in.weight.register_hook(lambda gradient: gradient*bad)
    with pytest.raises(FloatingPointError, match="the gradient is .* at step"): next(steps)
    assert state.step == 1 and same(everything(state), before)


def test_validation_loss_is_one_number():
    """The validation loss is the mean over all images, and the same at every call.

    It does not depend on other random draws, and it leaves no gradient behind.
    """
    model = randomised(UNet(TINY)).requires_grad_()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(validation_loss(model, FEW, SCHEDULER, batch_size=20))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    assert found[0] == found[1] and math.isfinite(found[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert validation_loss(randomised(UNet(TINY), seed=1), FEW, SCHEDULER, batch_size=20) != found[0]
    # predicts 0, so its loss is the mean of the squared targets
    zero = nn.Conv2d(1, 1, 1)
    def forward(x, t, labels):
        assert not torch.is_grad_enabled()
        return x*0
    zero.forward = forward
    noise_scheduler = NoiseScheduler.cosine(50)
    loss = validation_loss(zero, FEW, noise_scheduler, batch_size=20)
    assert abs(loss - 1) < 5*math.sqrt(2/FEW.images.numel())


def test_validation_uses_the_labels():
    "If the model is shown other labels, its validation loss changes."
    model, other = randomised(UNet(TINY)), copy.deepcopy(FEW)
    other.labels.copy_((other.labels + 1) % 10)
    assert abs(validation_loss(model, FEW, SCHEDULER) - validation_loss(model, other, SCHEDULER)) > 1e-4


def test_bf16_keeps_weights_and_loss_in_fp32():
    """Only the network computes in half precision.

    The losses differ a little from those in fp32.
    """
    losses = {}
    for precision in ("fp32", "bf16"):
        state = fresh_state()
        nn.init.normal_(state.model.conv_out.weight, std=0.1)        # otherwise both predict exactly 0
        record = next(train_steps(state, FEW, objective(CONFIG), CONFIG, precision))
        losses[precision] = record.losses
        assert record.losses.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in state.model.parameters())
    assert not torch.equal(*losses.values())
    assert_close(losses["bf16"], losses["fp32"], rtol=0.1, atol=0.02)   # bf16 keeps three digits at most


@pytest.mark.parametrize("settings", [
    dict(epochs=0), dict(batch_size=0), dict(max_steps=0), dict(lr=0.), dict(lr=math.nan), dict(lr=math.inf),
    dict(grad_clip=0.), dict(weight_decay=-1.), dict(warmup_steps=-1), dict(label_dropout=1.),
    dict(ema_decay=1.), dict(ema_decay=-0.1), dict(seed=-1), dict(epochs=2.5), dict(batch_size=32.),
    dict(max_steps=1.5), dict(warmup_steps="3"), dict(seed=None)])
def test_what_cannot_work_is_refused(settings):
    "A wrong setting raises an error when the config is made, and the message names the field."
    with pytest.raises(ValueError, match=next(iter(settings))): TrainConfig(**settings)


IMAGES, TIMES = torch.zeros(3, 1, 8, 8), torch.tensor([0, 20, 49])

WRONG_OUTPUTS = {"twice the channels": lambda x: torch.cat([x, x], dim=1), "one image": lambda x: x[:1],
                 "one row of pixels": lambda x: x[:, :, :1], "whole numbers": lambda x: x.long(),
                 "a pair": lambda x: (x, x)}

@pytest.mark.parametrize("output", WRONG_OUTPUTS.values(), ids=WRONG_OUTPUTS)
def test_loss_of_another_shape_is_refused(output):
    "A prediction that would have to be broadcast to the target, or that is not floating point, is refused."
    with pytest.raises(ValueError, match=r"the model's output is .*must be floating point \(3, 1, 8, 8\)"):
        diffusion_loss(lambda x, t: output(x), SCHEDULER, IMAGES, t=TIMES, noise=IMAGES)


@pytest.mark.parametrize("change, says", [
    (dict(x0=IMAGES.byte()), "x0 must be floating point"),
    (dict(x0=IMAGES.long(), noise=IMAGES.long()), "x0 must be floating point"),
    (dict(noise=IMAGES[:1]), "same shape"), (dict(noise=IMAGES.long()), "noise must be floating point"),
    (dict(t=TIMES.float()), "t must be int64"), (dict(t=TIMES.int()), "t must be int64"),
    (dict(t=TIMES[:1]), "t must be"), (dict(t=TIMES[:, None]), "t must be"),
    (dict(t=TIMES + 1), "t must be in"), (dict(labels=TIMES[:1]), "there are 3 samples")])
def test_loss_of_what_does_not_fit_together(change, says):
    "If images, noise, times or conditions do not fit together, the message names the wrong one."
    arguments = dict(x0=IMAGES, t=TIMES, noise=IMAGES, labels=TIMES) | change
    def model(x, t, labels): return x
    with pytest.raises((TypeError, ValueError), match=says):
        diffusion_loss(model, SCHEDULER, arguments.pop("x0"), **arguments)


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.eye(4, dtype=torch.long), torch.tensor(3),
                                    torch.zeros(4, dtype=torch.int32)],
                         ids=["floats", "one-hot", "one", "int32"])
def test_drop_labels_refuses_other_labels(labels):
    "Labels must be int64, one for each image. Of one-hot labels, only single digits would be dropped."
    with pytest.raises(ValueError, match=r"labels must be torch.int64 \(B\)"):
        drop_labels(labels, 0.5, random_generator(0))


def test_average_of_another_network_is_refused():
    """The average and the model must have the same weights, even where they could be broadcast.

    The error comes before anything has changed.
    """
    class Counter(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("count", value)
    pairs = [(nn.Linear(3, 2), nn.Linear(3, 1)), (nn.Linear(3, 2), nn.Linear(3, 2).double()),
             (nn.Linear(3, 2), nn.Linear(3, 2, bias=False)),
             (Counter(torch.zeros(2)), Counter(torch.zeros(1))),
             (Counter(torch.zeros(2).long()), Counter(torch.zeros(2)))]
    for average, other in pairs:
        before = copy.deepcopy(average.state_dict())
        with pytest.raises(ValueError, match="start it as a copy of the model"):
            update_ema(average, other, 0.5)
        assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())


def test_precision_must_be_known():
    "An unknown precision is refused. It would silently train in fp32."
    for precision in ("fp16", "BF16", torch.bfloat16, None):
        with pytest.raises(ValueError, match="precision must be fp32 or bf16"):
            next(train_steps(fresh_state(), FEW, objective(CONFIG), CONFIG, precision))
        with pytest.raises(ValueError, match="precision must be fp32 or bf16"):
            validation_loss(fresh_state().ema, FEW, SCHEDULER, precision=precision)


def test_batch_larger_than_the_data_is_refused():
    "A batch larger than the data is refused before the first step. A batch of all images is fine."
    config = TrainConfig(epochs=1, batch_size=51)
    with pytest.raises(ValueError, match="batch_size is 51, but there are only 50 images"):
        next(train_steps(fresh_state(config=config), FEW, objective(config), config))
    config = TrainConfig(epochs=1, batch_size=50)
    assert len(next(train_steps(fresh_state(config=config), FEW, objective(config), config)).losses) == 50


def test_conditions_with_too_few_rows_are_not_stretched():
    "One context for three images would be given to all of them."
    cond = {"labels": torch.arange(3), "context": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match="context is .*needs one row for each"):
        drop_conditions(cond, {"labels": 10, "context": torch.zeros(4)}, 0.5, random_generator(0))


def test_a_model_without_conditions_says_so():
    "Labels for it are an error, and the message names the model's side."
    model = UNet(replace(TINY, num_classes=0))
    with pytest.raises(ValueError, match=r"this model takes no conditions, but \['labels'\] were given"):
        diffusion_objective(SCHEDULER, 0.1)(model, IMAGES, {"labels": TIMES}, random_generator(0))


def whole_and_in_parts(network, data, build, size, parts):
    "The record and the weights of a few steps in one part, and in several."
    found = []
    for accumulate in (1, parts):
        config = TrainConfig(batch_size=size, max_steps=3, lr=1e-3, label_dropout=0.5, accumulate=accumulate)
        torch.manual_seed(0)
        state = new_state(network(), config)
        records = list(train_steps(state, data, build(config), config))
        found.append((records, [p.detach().clone() for p in state.model.parameters()]))
    return found


class Toy(nn.Module):
    "A network in float64."
    null_cond = {"labels": 10}

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 1, 3)
        self.embedding = nn.Embedding(11, 4)
        self.double()

    def forward(self, x, t, labels):
        h = self.conv(x) + self.embedding(labels)[:, :, None, None]*t[:, None, None, None]/50
        return self.out(h.sin())


class Precise:
    "The few images in float64."
    def __len__(self): return len(FEW)

    def batch(self, index, device):
        x0, cond = FEW.batch(index, device)
        return x0.double(), cond


def precise_objective(config):
    "The simple loss, without the float32 of `diffusion_loss`."
    def objective(model, x0, cond, generator):
        t = torch.randint(50, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        cond = drop_conditions(cond, model.null_cond, config.label_dropout, generator)
        error = model(SCHEDULER.add_noise(x0, noise, t), t, **cond) - SCHEDULER.target(x0, noise, t)
        return error.square().flatten(1).mean(dim=1), t/50
    return objective


@pytest.mark.parametrize("size, parts", [(20, 2), (20, 3), (20, 20), (7, 4), (48, 5)])
def test_parts_of_a_batch_are_the_batch(size, parts):
    """In float64 to 1e-10: losses, times, gradient and weights. Also if the parts are uneven.

    (48 images leave a last batch of 2, which has fewer images than parts.)
    """
    (whole, weights), (split, same_weights) = whole_and_in_parts(Toy, Precise(), precise_objective, size,
                                                                 parts)
    for one, other in zip(whole, split, strict=True):
        assert torch.equal(one.level, other.level) and len(other.losses) == len(one.losses)
        assert_close(one.losses, other.losses, rtol=1e-10, atol=0)
        assert math.isclose(one.loss, other.loss, rel_tol=1e-10)
        assert math.isclose(one.grad_norm, other.grad_norm, rel_tol=1e-10)
    for one, other in zip(weights, same_weights): assert_close(one, other, rtol=0, atol=1e-10)


def test_the_gradient_in_parts_against_autograd():
    "One part at a time, and by hand: torch.autograd.grad of the mean loss of the whole batch."
    config = TrainConfig(batch_size=10, accumulate=3)
    state = fresh_state(config=config)
    randomised(state.model).requires_grad_()
    x0, cond = FEW.batch(torch.arange(10), "cpu")
    losses, level = find_gradient(state, objective(config), x0, cond, config, 1e-3)
    generator = random_generator(config.seed, Stream.STEP, 0)
    whole, same_level = objective(config)(state.model, x0, cond, generator)
    wanted = torch.autograd.grad(whole.mean(), list(state.model.parameters()))
    assert torch.equal(level, same_level)
    assert_close(losses, whole.detach(), rtol=1e-5, atol=0)
    for parameter, gradient in zip(state.model.parameters(), wanted):
        assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_bound_in_parts():
    "The objective that also trains the variance, whose network gives twice the channels."
    def build(config): return hybrid_objective(SCHEDULER, config.label_dropout)
    def network(): return randomised(UNet(replace(TINY, learned_variance=True))).requires_grad_()
    (whole, weights), (split, same_weights) = whole_and_in_parts(network, FEW, build, 20, 3)
    for one, other in zip(whole, split): assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-5)
    for one, other in zip(weights, same_weights): assert_close(one, other, rtol=0, atol=1e-4)


def test_parts_are_computed_one_after_the_other():
    "The network sees 7, 7 and 6 images, and each part's graph is gone before the next one is made."
    config, seen = TrainConfig(batch_size=20, accumulate=3), []
    state = fresh_state(config=config)
    def counted(x, t, labels):
        open_graphs = sum(graph() is not None for _, graph in seen)
        assert open_graphs == 0
        output = state.model(x, t, labels)
        seen.append((len(x), weakref.ref(output)))
        return output
    counted.null_cond = state.model.null_cond
    next(train_steps(state, FEW, objective(config), config, model=counted))
    assert [n for n, _ in seen] == [7, 7, 6]


def test_a_run_in_parts_resumes_exactly():
    config = replace(CONFIG, accumulate=3)
    unbroken, stopped = fresh_state(), fresh_state()
    records = list(train_steps(unbroken, FEW, objective(config), config))
    for record in train_steps(stopped, FEW, objective(config), config):
        if record.step == 4: break
    rest = list(train_steps(stopped, FEW, objective(config), config))
    assert [record.loss for record in rest] == [record.loss for record in records[4:]]
    assert same(everything(stopped), everything(unbroken))


def test_a_bad_part_stops_before_the_step():
    "The second of two parts has a NaN: no weight has moved."
    config = TrainConfig(batch_size=20, accumulate=2)
    state = fresh_state(config=config)
    before = copy.deepcopy(list(state.model.parameters()))
    def broken(model, x0, cond, generator):
        losses, level = objective(config)(model, x0, cond, generator)
        return losses*torch.where(torch.arange(20) == 15, math.nan, 1.), level
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        next(train_steps(state, FEW, broken, config))
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters()))
