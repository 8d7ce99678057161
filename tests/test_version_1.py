"""With the same seeds, the package still gives the samples and losses of versions 0.6 and 0.7.

`version_1.py` stored their numbers.
"""
import json
import shutil
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from processes import Launcher, own_images, tiny
from version_1 import METHODS, SCHEDULERS, STORED, TINY, losses, process, samples

from ddpm_tutorial.data import to_uint8
from ddpm_tutorial.run.checkpoint import load_model
from ddpm_tutorial.run.device import sampling_steps
from ddpm_tutorial.run.tracking import read_metrics
from ddpm_tutorial.training import random_generator

# a run of version 0.6: its checkpoint after step 6 of 10, and its metrics of all 10 steps
RUN = Path(__file__).parent/"version_1"
FIELDS = ("loss", "lr", "grad_norm", "validation_loss", "epoch_loss", "loss_by_noise")


@pytest.fixture(scope="module")
def stored():
    with np.load(STORED) as arrays: return dict(arrays)


def close(found, wanted): np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", *SCHEDULERS])
def test_first_ten_losses(name, stored):
    "The first ten losses of `tiny`, for each scheduler, and the validation loss after them."
    close(losses({"tiny": TINY.scheduler, **SCHEDULERS}[name]), stored[f"losses_{name}"])


@pytest.mark.parametrize("name", METHODS)
def test_samples(name, stored):
    """Every sampler draws the same images with the trained `small` and guidance.

    Rounding errors grow on the way, so the tolerance is larger. A grey level may move by 1 at most.
    """
    found, wanted = samples(name), stored[f"samples_{name}"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert (to_uint8(torch.tensor(found)).int() - to_uint8(torch.tensor(wanted)).int()).abs().max() <= 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_process(name, stored):
    "Noise, targets, conversion, posterior, SNR and visited times of three schedules agree in float64."
    for key, found in process(SCHEDULERS[name].build()).items(): close(found, stored[f"{name}_{key}"])


def test_a_run_of_0_6_goes_on(tmp_path):
    """A run of version 0.6 resumes from its checkpoint.

    In steps 7 to 10, its losses and validation loss are those that version 0.6 had.
    """
    folder = tmp_path/"run"
    shutil.copytree(RUN/"checkpoints", folder/"checkpoints")
    command = tiny(own_images(tmp_path/"own.npz"), folder, "--max_steps", 10, "--resume")
    for name, value in (("--base_channels", 8), ("--num_groups", 4), ("--head_dim", 8)):
        command[command.index(name) + 1] = value
    command.insert(command.index("--attention_resolutions") + 1, 7)
    command += ["--time_distribution", "uniform"] # as in the preset `tiny` of that version
    with Launcher(tmp_path) as launcher: assert launcher.run(command) == (0, ANY)
    wanted = [json.loads(line) for line in (RUN/"metrics.jsonl").read_text().splitlines()]
    wanted = [line for line in wanted if line["step"] > 6]
    found = [line for line in read_metrics(folder) if line["step"] > 6]
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == [7, 8, 9, 10, 10]
    for one, other in zip(found, wanted):
        for field in FIELDS:
            assert (field in one) == (field in other)
            if field in one: close(one[field], other[field])


def test_a_checkpoint_of_0_6_draws(stored):
    "A checkpoint of version 0.6 still draws the same samples."
    model, config = load_model(RUN/"checkpoints"/"step_00000006.pth")
    labels = {"labels": torch.arange(10)}
    for step in sampling_steps(model, config, 10, labels, generator=random_generator(0)): pass
    close(step.x.numpy(), stored["samples_of_0_6"])
