"""Writes `version_1/numbers.npz`, the samples and losses of version 0.7.

It was run once, and the numbers must not change any more. Version 0.6 drew `samples_of_0_6` from its own
checkpoint, which is kept in the same folder.

usage: python tests/version_1.py
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ddpm_tutorial.data import load_sample
from ddpm_tutorial.fast_sampling import ddim_steps, dpm_solver_steps
from ddpm_tutorial.run.checkpoint import load_pretrained
from ddpm_tutorial.run.config import TINY
from ddpm_tutorial.run.device import new_model
from ddpm_tutorial.sampler import ddpm_steps, guided, sample
from ddpm_tutorial.scheduler import NoiseScheduler, SchedulerConfig
from ddpm_tutorial.training import (
    diffusion_objective,
    new_state,
    random_generator,
    train_steps,
    validation_loss,
)

STORED = Path(__file__).parent/"version_1"/"numbers.npz"
METHODS = {"ddpm": (ddpm_steps, dict(num_inference_steps=25)),
           "ddim": (ddim_steps, dict(num_inference_steps=10)),
           "ddim_eta": (ddim_steps, dict(num_inference_steps=10, eta=0.5)),
           "dpm++": (dpm_solver_steps, dict(num_inference_steps=10)),
           "dpm++_log_snr": (dpm_solver_steps, dict(num_inference_steps=10, spacing="log_snr")),
           "not_clipped": (dpm_solver_steps, dict(num_inference_steps=10, clip_sample=False))}
SCHEDULERS = {"linear": SchedulerConfig(num_steps=1000),
              "cosine": SchedulerConfig("cosine", 500, "v_prediction"),
              "large": SchedulerConfig("cosine", 200, "sample", "fixed_large")}
SPACINGS = [(5, False, "time"), (30, True, "time"), (30, False, "log_snr"), (None, False, "time")]

def losses(scheduler: SchedulerConfig) -> np.ndarray:
    "The first ten losses of `tiny` on the bundled training images, then its loss on the bundled test images."
    config = replace(TINY, scheduler=scheduler, train=replace(TINY.train, max_steps=10))
    state = new_state(new_model(config), config.train)
    objective = diffusion_objective(scheduler.build(), config.train.label_dropout)
    found = [step.loss for step in train_steps(state, load_sample(), objective, config.train)]
    return np.array([*found, validation_loss(state.ema, load_sample("test"), scheduler.build())])

def samples(name: str) -> np.ndarray:
    "A trouser and a sneaker, drawn by `small`."
    model, config = load_pretrained("small")
    method, options = METHODS[name]
    x = sample(guided(model, 1.3, {"labels": 10}), config.scheduler.build(), (2, 1, 28, 28),
               generator=random_generator(0), method=method, labels=torch.tensor([1, 7]), **options)
    return x.numpy()

def process(scheduler: NoiseScheduler) -> dict[str, np.ndarray]:
    "Forward process, posterior and conversion at twenty times, and the times that a sampler visits."
    t = torch.linspace(0, len(scheduler) - 1, 20).long()
    one, two, three = torch.randn(3, 20, 4, generator=random_generator(0), dtype=torch.float64)
    before = torch.div(t, 2, rounding_mode="floor") - 1
    found = {"add_noise": scheduler.add_noise(one, two, t), "target": scheduler.target(one, two, t),
             "snr": scheduler.snr(t)}
    found["x0"], found["noise"] = scheduler.to_x0_and_noise(three, one, t)
    found["mean"], found["variance"] = scheduler.posterior(one, two, t)
    found["far_mean"], found["far_variance"] = scheduler.posterior(one, two, t, before)
    for i, spacing in enumerate(SPACINGS): found[f"times_{i}"] = torch.tensor(scheduler.timesteps(*spacing))
    return {name: value.numpy() for name, value in found.items()}

def everything() -> dict[str, np.ndarray]:
    found = {f"losses_{name}": losses(config) for name, config in SCHEDULERS.items()}
    found["losses_tiny"] = losses(TINY.scheduler)
    found |= {f"samples_{name}": samples(name) for name in METHODS}
    for name, config in SCHEDULERS.items():
        found |= {f"{name}_{key}": value for key, value in process(config.build()).items()}
    return found

if __name__ == "__main__":
    with np.load(STORED) as arrays: of_0_6 = arrays["samples_of_0_6"]
    np.savez_compressed(STORED, samples_of_0_6=of_0_6, **everything())
