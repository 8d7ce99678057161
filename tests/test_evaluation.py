"The figures against formulas worked out otherwise, and the command as a user types it."
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from ddpm_tutorial import metrics
from ddpm_tutorial.data import CLASSES, ImageData, load_fashion_mnist, load_sample
from ddpm_tutorial.metrics import (CLASSIFIER, ClassifierOutput, matched_subset, class_agreement, density_and_coverage, compute_metrics,
                                   frechet_distance, kernel_distance, load_classifier, extract_features,
                                   nearest_distance, paired_difference, train_classifier)
from ddpm_tutorial.run import evaluate
from ddpm_tutorial.run.checkpoint import (PRETRAINED, CheckpointError, load_model, load_pretrained,
                                          save_weights)
from ddpm_tutorial.run.config import PRESETS, SamplingConfig
from ddpm_tutorial.run.device import new_model

def points(n, d, seed=0): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

def skewed(n, d, seed=0):
    "Correlated points whose spread differs by direction."
    return points(n, d, seed) @ points(d, d, 99) + points(1, d, 98)

def command(*args):
    "Exit code of `ddpm_evaluate`."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ddpm_evaluate", *map(str, args)])
        try: evaluate.ddpm_evaluate()
        except SystemExit as stop: return stop.code
    return 0

# --- figures ---

def test_frechet_distance_by_the_matrix_root():
    "The formula with scipy's matrix square root, in float64."
    one, other = skewed(300, 12), 1.3*skewed(200, 12, 1) + 0.2
    a, b = one.double().numpy(), other.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(first + second - 2*linalg.sqrtm(first @ second).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)

def test_kernel_distance_by_all_pairs():
    "With subsets that are the whole set: the unbiased estimate, pair by pair. And zero on average for one distribution."
    one, other = points(40, 6), points(40, 6, 1) + 0.5
    kernel = lambda x, y: ((x.double() @ y.double().T)/6 + 1)**3
    inner = lambda k: (k.sum() - k.diagonal().sum())/(len(k)*(len(k) - 1))
    half = [(torch.randperm(40), torch.randperm(40)) for _ in range(400)]
    expected = np.mean([(inner(kernel(one[a[:20]], one[a[:20]])) + inner(kernel(other[b[:20]], other[b[:20]])) - 2*kernel(one[a[:20]], other[b[:20]]).mean()).item() for a, b in half])
    assert kernel_distance(one, other, subsets=400) == pytest.approx(expected, rel=0.1)
    before = torch.get_rng_state()
    found = [kernel_distance(points(100, 8, seed), points(100, 8, seed + 1000), subsets=5) for seed in range(300)]
    assert abs(np.mean(found)) < 3*np.std(found)/300**0.5 and min(found) < 0 < max(found)
    assert kernel_distance(one, other) == kernel_distance(one, other) and torch.equal(torch.get_rng_state(), before) # it leaves the dice alone

def test_density_and_coverage_by_counting():
    "One ball after the other."
    real, generated = points(60, 3), 0.8*points(45, 3, 1)
    distance = np.linalg.norm(real[:, None].numpy() - real[None].numpy(), axis=-1)
    radius = np.sort(distance, axis=1)[:, 5]
    inside = np.linalg.norm(real[:, None].numpy() - generated[None].numpy(), axis=-1) < radius[:, None]
    density, coverage = density_and_coverage(real, generated)
    assert density == pytest.approx(inside.sum()/(5*45)) and coverage == pytest.approx(np.mean(inside.any(axis=1)))

def test_nearest_distance_by_hand():
    "Root mean square over the pixels, in grey levels, over more images than one batch; colour too."
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator) for n in (230, 40))
    expected = ((images[:, None].double() - others[None].double())**2).mean(dim=(2, 3, 4)).sqrt().min(dim=1).values
    torch.testing.assert_close(nearest_distance(images, others).double(), expected, rtol=1e-4, atol=1e-2)
    assert not nearest_distance(others, others).any()
    images = load_sample().images
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):       # the order of a sum depends on it, and with it the rounding
            torch.set_num_threads(number)
            assert not nearest_distance(images[:50], images).any()
    finally: torch.set_num_threads(threads)

def test_class_agreement():
    "Share and standard error; the latter as scipy has it."
    seen = ClassifierOutput(points(200, 128), torch.arange(200) % 10)
    labels = (torch.arange(200) % 10).where(torch.arange(200) >= 30, torch.tensor(11))
    share, error = class_agreement(seen, labels)
    assert share == 0.85 and error == pytest.approx(stats.binom(200, 0.85).std()/200)

def test_figures_notice_what_they_are_for():
    "Wrong labels, copies, a part that is missing: each in the figure that is there for it."
    reference, fresh, classifier = load_sample("train"), load_sample("test"), load_classifier()
    seen = extract_features(reference.images, classifier)
    measure = lambda images: compute_metrics(images, reference, seen, classifier)
    real = measure(fresh)
    assert real["class_agreement"] > 0.88 and real["coverage"] > 0.9
    assert measure(replace(fresh, labels=fresh.labels.roll(20)))["class_agreement"] < 0.1
    assert measure(matched_subset(reference, fresh.labels))["nearest_training_image"] == 0 < real["nearest_training_image"]
    shoes = fresh[(fresh.labels == 7) | (fresh.labels == 9)]
    assert measure(shoes)["coverage"] < 0.6*measure(matched_subset(fresh, torch.arange(40) % 10))["coverage"]
    unlabelled = ImageData(fresh.images, torch.zeros_like(fresh.labels), ())
    assert "class_agreement" not in measure(unlabelled) and measure(unlabelled)["frechet_distance"] == real["frechet_distance"]

def test_alike():
    "As many of each class, none twice, in another choice for another seed."
    data, labels = load_sample("train"), torch.tensor([3]*5 + [9]*2)
    numbered = ImageData(data.images, data.labels, CLASSES)
    chosen = matched_subset(numbered, labels)
    assert chosen.labels.tolist() == [3]*5 + [9]*2 and len(chosen.images.flatten(1).unique(dim=0)) == 7
    assert not torch.equal(chosen.images, matched_subset(numbered, labels, seed=1).images)
    with pytest.raises(ValueError, match="101 samples of class 'Bag'.*there are 100"): matched_subset(data, torch.full((101,), 8))

# --- the classifier ---

def test_classifier_is_as_good_as_promised():
    "At least 93 % of the 10,000 test images."
    if not os.environ.get("DDPM_DATA_ROOT"): pytest.skip("the real Fashion-MNIST is not at hand: set DDPM_DATA_ROOT to the folder that holds FashionMNIST/raw")
    test = load_fashion_mnist(None, "published_test")
    assert (extract_features(test.images, load_classifier()).classes == test.labels).float().mean() >= 0.93

def test_another_classifier_is_refused(tmp_path, monkeypatch):
    "One changed byte, and no figure is given."
    stored = bytearray(CLASSIFIER.read_bytes())
    stored[-1] ^= 1
    (tmp_path/"classifier.safetensors").write_bytes(stored)
    monkeypatch.setattr(metrics, "CLASSIFIER", tmp_path/"classifier.safetensors")
    with pytest.raises(RuntimeError, match="not the published classifier"): load_classifier()

def test_train_classifier_learns_and_repeats():
    "Three rounds over 1,000 images: far better than guessing, the same every time, the global dice untouched."
    data, test, before = load_sample("train"), load_sample("test"), torch.get_rng_state()
    one, other = train_classifier(data, epochs=3), train_classifier(data, epochs=3)
    assert torch.equal(torch.get_rng_state(), before) and not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert (extract_features(test.images, one).classes == test.labels).float().mean() > 0.4

# --- trained weights ---

def test_the_small_model_that_comes_with_the_package():
    "Its configuration is the preset's, its file is small, its weights are numbers."
    model, config = load_pretrained()
    assert config.model == PRESETS["small"].model and config.scheduler == PRESETS["small"].scheduler
    assert PRETRAINED["small"].stat().st_size <= 8e6 and not model.training
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in model.state_dict().values())
    with pytest.raises(ValueError, match="name must be one of"): load_pretrained("tiny")

def test_save_weights_there_and_back(tmp_path):
    "Half precision, and the same configuration; a file that is cut, changed or of another kind is refused with its name."
    config = replace(PRESETS["tiny"], sampling=SamplingConfig(guidance_scale=1.25))
    weights = new_model(config).state_dict()
    save_weights(tmp_path/"a.safetensors", weights, config)
    model, found = load_model(tmp_path/"a.safetensors")
    assert found == config and all(torch.equal(weight, weights[name].half().float()) for name, weight in model.state_dict().items())
    save_weights(tmp_path/"b.safetensors", {name: weight for name, weight in weights.items() if "conv_out" not in name}, config)
    (tmp_path/"c.safetensors").write_bytes((tmp_path/"a.safetensors").read_bytes()[:-1])
    (tmp_path/"d.safetensors").write_bytes(b"PK" + bytes(100))
    (tmp_path/"e.safetensors").write_bytes(CLASSIFIER.read_bytes())     # no configuration
    for name, message in (("b", "do not fit"), ("c", "cannot be read"), ("d", "is damaged or no checkpoint"), ("e", "must come from save_weights"), ("f", "is not there")):
        with pytest.raises(CheckpointError, match=f"{name}.safetensors.*{message}"): load_model(tmp_path/f"{name}.safetensors")

# --- the command ---

REAL = ("--data", "sample", "--device", "cpu")
QUICK = (*REAL, "--num_samples", 20, "--num_inference_steps", 2)

def test_evaluate_the_shipped_model(tmp_path, monkeypatch, capsys):
    "Without any checkpoint: figures of samples and of real images, printed and in a file of the run's own folder."
    monkeypatch.chdir(tmp_path)
    assert command(*QUICK) == 0
    result, said = json.loads((tmp_path/"outputs"/"small"/"evaluation.json").read_text()), capsys.readouterr()
    assert result["samples"].keys() == result["real"].keys() and result["num_images"] == 20 and result["num_reference"] == 1000
    assert "the trained small, dpm++, 2 steps, guidance 1.3, averaged weights, seed 0" in said.out and "20 images against 1,000 training images" in said.out
    assert f"{result['samples']['frechet_distance']:.4g}" in said.out and said.err == ""
    assert command(*QUICK, "--output", "again.json") == 0
    assert json.loads((tmp_path/"again.json").read_text()) == result      # the same seed, the same figures

def test_evaluate_a_file_of_samples(tmp_path):
    "Real images as samples: the figures of real images. Without labels there is no agreement."
    fresh = load_sample("test")
    pixels = fresh.images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path/"real.npz", arr_0=pixels, arr_1=fresh.labels.numpy())
    assert command(*REAL, "--samples", tmp_path/"real.npz", "--output", tmp_path/"a.json") == 0
    found = json.loads((tmp_path/"a.json").read_text())
    assert found["num_images"] == 200 and found["samples"]["frechet_distance"] == pytest.approx(found["real"]["frechet_distance"], rel=1e-3)
    np.savez(tmp_path/"bare.npz", arr_0=pixels[:50])
    assert command(*REAL, "--samples", tmp_path/"bare.npz", "--output", tmp_path/"b.json") == 0
    found = json.loads((tmp_path/"b.json").read_text())
    assert "class_agreement" not in found["samples"] and "class_agreement" not in found["real"]

@pytest.mark.parametrize("args, code, message", [
    (("--checkpoint", "nowhere.pth"), 2, "nowhere.pth is not there"),
    (("--num_samples", 2000), 2, "take fewer samples"),
    (("--num_inference_steps", 501), 2, "num_inference_steps must be in 1 ... 500"),
    (("--samples", "nothing.npz"), 1, "nothing.npz"),
    (("--samples", "colour.npz"), 2, "1x28x28 pixels, not 3x28x28"),
    (("--samples", "labels.npz"), 2, "labels up to 12"),
])
def test_evaluate_refuses(tmp_path, monkeypatch, capsys, args, code, message):
    "One line that says what is wrong; no file."
    monkeypatch.chdir(tmp_path)
    fresh = load_sample("test")
    np.savez(tmp_path/"colour.npz", arr_0=fresh.images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(), arr_1=fresh.labels.numpy())
    np.savez(tmp_path/"labels.npz", arr_0=fresh.images.permute(0, 2, 3, 1).numpy(), arr_1=fresh.labels.numpy() % 2 + 11)
    assert command(*(REAL if "--samples" in args else QUICK), *args) == code
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))

def test_too_few_real_images_is_said_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    "Minutes of drawing are not spent on samples that cannot be compared; samples without labels need as many, too."
    monkeypatch.setattr(evaluate, "draw_samples", lambda *_, **__: pytest.fail("something was drawn"))
    assert command(*QUICK, "--num_samples", 2000, "--output", tmp_path/"a.json") == 2
    np.savez(tmp_path/"bare.npz", arr_0=load_sample("train").images[:201].permute(0, 2, 3, 1).numpy())
    assert command(*REAL, "--samples", tmp_path/"bare.npz", "--output", tmp_path/"a.json") == 2
    assert "201 samples need as many real images" in capsys.readouterr().err and not (tmp_path/"a.json").exists()

# --- two settings ---

def test_paired_difference_is_the_paired_t_test():
    "Mean and error give scipy's t; a shift that all seeds share changes neither; what is no set of pairs is refused."
    one, other = points(7, 2).T.double().unbind()
    for n in (2, 7):
        mean, error = paired_difference(one[:n].tolist(), other[:n].tolist())
        assert mean/error == pytest.approx(stats.ttest_rel(one[:n], other[:n]).statistic, rel=1e-9) and mean == pytest.approx((one[:n] - other[:n]).mean().item())
    luck = 100*points(7, 1, 1)[:, 0].double()
    assert paired_difference(one + luck, other + luck) == pytest.approx(paired_difference(one, other), rel=1e-9)
    assert paired_difference(other, one)[0] == -paired_difference(one, other)[0]
    with pytest.raises(ValueError, match="at least two pairs are needed, not 1"): paired_difference([0.1], [0.2])
    with pytest.raises(ValueError, match="at least two pairs are needed, not 0"): paired_difference([], [])
    with pytest.raises(ValueError, match="3 figures of one setting and 2 of the other"): paired_difference([1., 2., 3.], [1., 2.])

# --- too few, other endings, other devices ---

@pytest.mark.parametrize("n, code", [(1, 2), (3, 2), (19, 2), (20, 0)])
def test_a_file_of_too_few_images_is_refused_by_a_sentence(tmp_path, capsys, n, code):
    "As for --num_samples: 20 are needed; and the file is named."
    np.savez(tmp_path/"few.npz", arr_0=load_sample("test").images[:n].permute(0, 2, 3, 1).numpy())
    assert command(*REAL, "--samples", tmp_path/"few.npz", "--output", tmp_path/"a.json") == code
    said = capsys.readouterr().err
    if code: assert f"few.npz: at least 20 images are needed, and there are {n}" in said and "Traceback" not in said
    assert (tmp_path/"a.json").exists() == (code == 0)

def test_samples_are_measured_as_they_are(tmp_path):
    "Options that decide how to draw would have no effect, so they are refused; the figures lie beside the samples."
    with (tmp_path/"real.npz").open("wb") as file: np.savez(file, arr_0=load_sample("test").images.permute(0, 2, 3, 1).numpy())
    for unused in (("--guidance_scale", 3), ("--checkpoint", tmp_path/"a.pth"), ("--method", "ddim")):
        assert command(*REAL, "--samples", tmp_path/"real.npz", *unused) == 2
    assert not list(tmp_path.glob("*.json"))
    assert command(*REAL, "--samples", tmp_path/"real.npz") == 0 and (tmp_path/"real.json").exists()

def test_endings_in_any_case(tmp_path):
    ".NPZ and .Json are what .npz and .json are."
    with (tmp_path/"real.NPZ").open("wb") as file: np.savez(file, arr_0=load_sample("test").images.permute(0, 2, 3, 1).numpy())
    assert command(*REAL, "--samples", tmp_path/"real.NPZ", "--output", tmp_path/"a.Json") == 0
    assert json.loads((tmp_path/"a.Json").read_text())["num_images"] == 200
    assert command(*REAL, "--samples", tmp_path/"real.png") == command(*QUICK, "--output", tmp_path/"a.txt") == 2

def test_train_classifier_on_another_device(monkeypatch):
    "Weights, batches and autocast are on the device that was asked for; a step on the CPU would not run with weights elsewhere."
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda device, *_, **__: asked.append(device) or nullcontext())
    found = train_classifier(load_sample("train"), epochs=1, device="meta")
    assert {weight.device.type for weight in found.state_dict().values()} == set(asked) == {"meta"}
    assert {weight.device.type for weight in train_classifier(load_sample("train")[:128], epochs=1).state_dict().values()} == {"cpu"}

def test_look_at_follows_the_classifier():
    "Images go to its device, batch by batch; what it has seen comes back to the CPU."
    class Far(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.places = torch.nn.Parameter(torch.zeros(1, device="meta")), []
        def features(self, x):
            self.places.append(x.device.type)
            return torch.zeros(len(x), 128)
        def head(self, features): return torch.zeros(len(features), 10)
    classifier = Far()
    seen = extract_features(load_sample("test").images, classifier, batch_size=100)
    assert classifier.places == ["meta"]*2 and seen.features.device.type == seen.classes.device.type == "cpu"
    if torch.cuda.is_available():
        here, there = (extract_features(load_sample("test").images, load_classifier().to(device)) for device in ("cpu", "cuda"))
        assert there.features.device.type == "cpu" and torch.allclose(here.features, there.features, atol=1e-2)

# --- tools/results.py ---

def test_results_in_quick_form(tmp_path):
    "Every setting and the real images for each seed, the same as `ddpm_evaluate` says; copies are found, mirrored ones are not; a second call draws nothing."
    command_line = [sys.executable, Path(__file__).parent.parent/"tools"/"results.py", "--quick", "--seeds", "2", "--output", "found.json"]
    run = lambda: subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert run().count("seed 1") == 5
    result = json.loads((tmp_path/"found.json").read_text())
    rows = {(row["what"], row["seed"]): row for row in result["rows"]}
    assert len(rows) == 10 and rows["guidance 2", 0]["frechet_distance"] != rows["guidance 2", 1]["frechet_distance"]
    assert command(*QUICK, "--guidance_scale", 2, "--seed", 1, "--output", tmp_path/"a.json") == 0
    assert rows["guidance 2", 1]["frechet_distance"] == pytest.approx(json.loads((tmp_path/"a.json").read_text())["samples"]["frechet_distance"], rel=1e-6)
    near = result["nearest"]
    assert set(near["copies"]) == {0} and min(near["copies, one pixel to the right"]) > 0 and near["guidance 1.3"] == sorted(near["guidance 1.3"])
    assert run().count("seed") == 0 and json.loads((tmp_path/"found.json").read_text()) == result
