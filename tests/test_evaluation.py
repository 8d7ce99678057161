"The measures against formulas worked out in another way, and the command as a user types it."
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scripts import run_script

from ddpm_tutorial import metrics
from ddpm_tutorial.data import CLASSES, ImageData, load_fashion_mnist, load_sample
from ddpm_tutorial.likelihood import flow_bits
from ddpm_tutorial.metrics import (
    CLASSIFIER,
    ClassifierOutput,
    class_agreement,
    compute_metrics,
    density_and_coverage,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_classifier,
    matched_subset,
    nearest_distance,
    paired_difference,
    train_classifier,
)
from ddpm_tutorial.run import evaluate
from ddpm_tutorial.run.checkpoint import (
    PRETRAINED,
    CheckpointError,
    load_model,
    load_pretrained,
    save_weights,
)
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
    shift = ((a.mean(0) - b.mean(0))**2).sum()
    expected = shift + np.trace(first + second - 2*linalg.sqrtm(first @ second).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)

def test_kernel_distance_by_all_pairs():
    """With subsets that are half of the set, against the unbiased estimate, pair by pair.

    On average it is zero for two sets from one distribution.
    """
    one, other = points(40, 6), points(40, 6, 1) + 0.5
    def kernel(x, y): return ((x.double() @ y.double().T)/6 + 1)**3
    def without_diagonal(k): return (k.sum() - k.diagonal().sum())/(len(k)*(len(k) - 1))
    def estimate(x, y):
        return without_diagonal(kernel(x, x)) + without_diagonal(kernel(y, y)) - 2*kernel(x, y).mean()
    half = [(torch.randperm(40), torch.randperm(40)) for _ in range(400)]
    expected = np.mean([estimate(one[a[:20]], other[b[:20]]).item() for a, b in half])
    assert kernel_distance(one, other, subsets=400) == pytest.approx(expected, rel=0.1)
    before = torch.get_rng_state()
    found = [kernel_distance(points(100, 8, seed), points(100, 8, seed + 1000), subsets=5)
             for seed in range(300)]
    assert abs(np.mean(found)) < 3*np.std(found)/300**0.5 and min(found) < 0 < max(found)
    assert kernel_distance(one, other) == kernel_distance(one, other)
    assert torch.equal(torch.get_rng_state(), before) # the global generator is untouched

def test_density_and_coverage_by_counting():
    "By counting one ball after the other."
    real, generated = points(60, 3), 0.8*points(45, 3, 1)
    distance = np.linalg.norm(real[:, None].numpy() - real[None].numpy(), axis=-1)
    radius = np.sort(distance, axis=1)[:, 5]
    inside = np.linalg.norm(real[:, None].numpy() - generated[None].numpy(), axis=-1) < radius[:, None]
    density, coverage = density_and_coverage(real, generated)
    assert density == pytest.approx(inside.sum()/(5*45))
    assert coverage == pytest.approx(np.mean(inside.any(axis=1)))

def test_nearest_distance_by_hand():
    "Root mean square over the pixels, in grey levels. More images than fit into one batch, in colour."
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
                      for n in (230, 40))
    squares = (images[:, None].double() - others[None].double())**2
    expected = squares.mean(dim=(2, 3, 4)).sqrt().min(dim=1).values
    torch.testing.assert_close(nearest_distance(images, others).double(), expected, rtol=1e-4, atol=1e-2)
    assert not nearest_distance(others, others).any()
    images = load_sample().images
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):       # the number of threads changes the order of a sum, and so its rounding
            torch.set_num_threads(number)
            assert not nearest_distance(images[:50], images).any()
    finally: torch.set_num_threads(threads)

def test_class_agreement():
    "The share, and its standard error as scipy computes it."
    seen = ClassifierOutput(points(200, 128), torch.arange(200) % 10)
    labels = (torch.arange(200) % 10).where(torch.arange(200) >= 30, torch.tensor(11))
    share, error = class_agreement(seen, labels)
    assert share == 0.85 and error == pytest.approx(stats.binom(200, 0.85).std()/200)

def test_figures_notice_what_they_are_for():
    "Wrong labels, copies and missing classes each show in the measure that is meant for them."
    reference, fresh, classifier = load_sample("train"), load_sample("test"), load_classifier()
    seen = extract_features(reference.images, classifier)
    def measure(images): return compute_metrics(images, reference, seen, classifier)
    real = measure(fresh)
    assert real["class_agreement"] > 0.88 and real["coverage"] > 0.9
    assert measure(replace(fresh, labels=fresh.labels.roll(20)))["class_agreement"] < 0.1
    copies = measure(matched_subset(reference, fresh.labels))
    assert copies["nearest_training_image"] == 0 < real["nearest_training_image"]
    shoes = fresh[(fresh.labels == 7) | (fresh.labels == 9)]
    of_all_classes = matched_subset(fresh, torch.arange(40) % 10)
    assert measure(shoes)["coverage"] < 0.6*measure(of_all_classes)["coverage"]
    unlabelled = ImageData(fresh.images, torch.zeros_like(fresh.labels), ())
    found = measure(unlabelled)
    assert "class_agreement" not in found and found["frechet_distance"] == real["frechet_distance"]

def test_alike():
    "The subset has as many images of each class, none twice. Another seed chooses other ones."
    data, labels = load_sample("train"), torch.tensor([3]*5 + [9]*2)
    numbered = ImageData(data.images, data.labels, CLASSES)
    chosen = matched_subset(numbered, labels)
    assert chosen.labels.tolist() == [3]*5 + [9]*2 and len(chosen.images.flatten(1).unique(dim=0)) == 7
    assert not torch.equal(chosen.images, matched_subset(numbered, labels, seed=1).images)
    with pytest.raises(ValueError, match="101 samples of class 'Bag'.*there are 100"):
        matched_subset(data, torch.full((101,), 8))

# --- the classifier ---

def test_classifier_is_as_good_as_promised():
    "At least 93 % of the 10,000 test images."
    if not os.environ.get("DDPM_DATA_ROOT"):
        pytest.skip("needs the real Fashion-MNIST: set DDPM_DATA_ROOT to the folder with FashionMNIST/raw")
    test = load_fashion_mnist(None, "published_test")
    seen = extract_features(test.images, load_classifier())
    assert (seen.classes == test.labels).float().mean() >= 0.93

def test_another_classifier_is_refused(tmp_path, monkeypatch):
    "If one byte is changed, nothing is measured."
    stored = bytearray(CLASSIFIER.read_bytes())
    stored[-1] ^= 1
    (tmp_path/"classifier.safetensors").write_bytes(stored)
    monkeypatch.setattr(metrics, "CLASSIFIER", tmp_path/"classifier.safetensors")
    with pytest.raises(RuntimeError, match="not the published classifier"): load_classifier()

def test_train_classifier_learns_and_repeats():
    "Three epochs: far better than guessing, the same every time, the global generator untouched."
    data, test, before = load_sample("train"), load_sample("test"), torch.get_rng_state()
    one, other = train_classifier(data, epochs=3), train_classifier(data, epochs=3)
    assert torch.equal(torch.get_rng_state(), before) and not one.training
    weights = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert (extract_features(test.images, one).classes == test.labels).float().mean() > 0.4

# --- trained weights ---

def test_the_small_model_that_comes_with_the_package():
    "Its configuration is that of the preset, its file is small, and its weights are finite."
    model, config = load_pretrained()
    assert config == PRESETS["small"]
    assert PRETRAINED["small"].stat().st_size <= 8e6 and not model.training
    weights = model.state_dict().values()
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights)
    with pytest.raises(ValueError, match="name must be one of"): load_pretrained("tiny")

@pytest.mark.parametrize("name, steps", [("small_few", 4), ("small_one", 1)])
def test_the_students_that_come_with_the_package(name, steps):
    "Each has the network of its teacher, its own number of steps, and other weights."
    model, config = load_pretrained(name)
    teacher, of_teacher = load_pretrained()
    assert config.model == of_teacher.model and config.scheduler == of_teacher.scheduler
    assert config.student_steps == config.inference_steps == steps and config.sampling.method == "ddim"
    assert PRETRAINED[name].stat().st_size <= 8e6 and not model.training
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    moved = sum((one - other).square().sum() for one, other in zip(model.parameters(), teacher.parameters()))
    assert 0.01 < moved.sqrt()/sum(weight.square().sum() for weight in teacher.parameters()).sqrt() < 1

def test_save_weights_there_and_back(tmp_path):
    """The weights come back in half precision with the same configuration.

    A file that is cut, changed or of another kind is refused, and the error names it.
    """
    config = replace(PRESETS["tiny"], sampling=SamplingConfig(guidance_scale=1.25))
    weights = new_model(config).state_dict()
    save_weights(tmp_path/"a.safetensors", weights, config)
    model, found = load_model(tmp_path/"a.safetensors")
    assert found == config
    assert all(torch.equal(weight, weights[name].half().float())
               for name, weight in model.state_dict().items())
    fewer = {name: weight for name, weight in weights.items() if "conv_out" not in name}
    save_weights(tmp_path/"b.safetensors", fewer, config)
    (tmp_path/"c.safetensors").write_bytes((tmp_path/"a.safetensors").read_bytes()[:-1])
    (tmp_path/"d.safetensors").write_bytes(b"PK" + bytes(100))
    (tmp_path/"e.safetensors").write_bytes(CLASSIFIER.read_bytes())     # no configuration
    messages = {"b": "do not fit", "c": "cannot be read", "d": "is damaged or no checkpoint",
                "e": "must come from save_weights", "f": "is not there"}
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=f"{name}.safetensors.*{message}"):
            load_model(tmp_path/f"{name}.safetensors")

# --- the command ---

REAL = ("--data", "sample", "--device", "cpu")
QUICK = (*REAL, "--num_samples", 20, "--num_inference_steps", 2)

def test_evaluate_the_shipped_model(tmp_path, monkeypatch, capsys):
    "Without a checkpoint: samples and real images are measured, and the result is printed and stored."
    monkeypatch.chdir(tmp_path)
    assert command(*QUICK) == 0
    result = json.loads((tmp_path/"outputs"/"small"/"evaluation.json").read_text())
    said = capsys.readouterr()
    assert result["samples"].keys() == result["real"].keys()
    assert result["num_images"] == 20 and result["num_reference"] == 1000
    how = "dpm++, 2 steps, guidance 2.2, at noise levels from 0.3 to 2, eta 0.7, averaged weights, seed 0"
    assert f"the trained small, {how}" in said.out
    assert "20 images against 1,000 training images" in said.out
    assert f"{result['samples']['frechet_distance']:.4g}" in said.out and said.err == ""
    assert command(*QUICK, "--output", "again.json") == 0
    assert json.loads((tmp_path/"again.json").read_text()) == result      # the same seed, the same figures

def test_bits_per_dimension(tmp_path, monkeypatch, capsys):
    "With --bits_per_dim the bound and the value by the flow are stored and printed; the flow's is lower."
    monkeypatch.setattr(evaluate, "load_sample", lambda split: load_sample(split)[::2])
    def in_few_steps(*args, num_inference_steps, **kwargs):
        return flow_bits(*args, num_inference_steps=20, **kwargs)
    monkeypatch.setattr(evaluate, "flow_bits", in_few_steps)
    assert command(*QUICK, "--bits_per_dim", "--output", tmp_path/"a.json") == 0
    bits, said = json.loads((tmp_path/"a.json").read_text())["bits_per_dim"], capsys.readouterr().out
    assert bits["num_images"] == 100 and bits["num_flow"] == 20
    assert 2 < bits["flow"] < bits["bound"] < 4.5 and bits["bound_error"] > 0
    assert f"at most {bits['bound']:.3f} ± {bits['bound_error']:.3f} by the bound" in said
    assert command(*REAL, "--samples", "mine.npz", "--bits_per_dim") == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").replace("|", " ").split())
    assert "samples are measured as they are: leave bits_per_dim out" in said

def test_evaluate_a_file_of_samples(tmp_path):
    "If real images are the samples, they are measured as real images. Without labels there is no agreement."
    fresh = load_sample("test")
    pixels = fresh.images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path/"real.npz", arr_0=pixels, arr_1=fresh.labels.numpy())
    assert command(*REAL, "--samples", tmp_path/"real.npz", "--output", tmp_path/"a.json") == 0
    found = json.loads((tmp_path/"a.json").read_text())
    of_samples, of_real = (found[name]["frechet_distance"] for name in ("samples", "real"))
    assert found["num_images"] == 200 and of_samples == pytest.approx(of_real, rel=1e-3)
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
    "One line says what is wrong, and no file is written."
    monkeypatch.chdir(tmp_path)
    fresh = load_sample("test")
    labels, pixels = fresh.labels.numpy(), fresh.images.permute(0, 2, 3, 1)
    np.savez(tmp_path/"colour.npz", arr_0=pixels.expand(-1, -1, -1, 3).numpy(), arr_1=labels)
    np.savez(tmp_path/"labels.npz", arr_0=pixels.numpy(), arr_1=labels % 2 + 11)
    assert command(*(REAL if "--samples" in args else QUICK), *args) == code
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))

def test_too_few_real_images_is_said_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    """No minutes are spent on drawing samples that cannot be compared.

    Samples without labels need as many real images too.
    """
    monkeypatch.setattr(evaluate, "draw_samples", lambda *_, **__: pytest.fail("something was drawn"))
    assert command(*QUICK, "--num_samples", 2000, "--output", tmp_path/"a.json") == 2
    np.savez(tmp_path/"bare.npz", arr_0=load_sample("train").images[:201].permute(0, 2, 3, 1).numpy())
    assert command(*REAL, "--samples", tmp_path/"bare.npz", "--output", tmp_path/"a.json") == 2
    assert "201 samples need as many real images" in capsys.readouterr().err
    assert not (tmp_path/"a.json").exists()

# --- two settings ---

def test_paired_difference_is_the_paired_t_test():
    """Mean and error give scipy's t.

    A shift that all seeds share changes neither. What is no set of pairs is refused.
    """
    one, other = points(7, 2).T.double().unbind()
    for n in (2, 7):
        mean, error = paired_difference(one[:n].tolist(), other[:n].tolist())
        assert mean/error == pytest.approx(stats.ttest_rel(one[:n], other[:n]).statistic, rel=1e-9)
        assert mean == pytest.approx((one[:n] - other[:n]).mean().item())
    luck = 100*points(7, 1, 1)[:, 0].double()
    expected = pytest.approx(paired_difference(one, other), rel=1e-9)
    assert paired_difference(one + luck, other + luck) == expected
    assert paired_difference(other, one)[0] == -paired_difference(one, other)[0]
    with pytest.raises(ValueError, match="at least two pairs are needed, not 1"):
        paired_difference([0.1], [0.2])
    with pytest.raises(ValueError, match="at least two pairs are needed, not 0"): paired_difference([], [])
    with pytest.raises(ValueError, match="3 figures of one setting and 2 of the other"):
        paired_difference([1., 2., 3.], [1., 2.])

# --- too few, other endings, other devices ---

@pytest.mark.parametrize("n, code", [(1, 2), (3, 2), (19, 2), (20, 0)])
def test_a_file_of_too_few_images_is_refused_by_a_sentence(tmp_path, capsys, n, code):
    "As with --num_samples, at least 20 are needed. The message names the file."
    np.savez(tmp_path/"few.npz", arr_0=load_sample("test").images[:n].permute(0, 2, 3, 1).numpy())
    assert command(*REAL, "--samples", tmp_path/"few.npz", "--output", tmp_path/"a.json") == code
    said = capsys.readouterr().err
    if code:
        assert f"few.npz: at least 20 images are needed, and there are {n}" in said
        assert "Traceback" not in said
    assert (tmp_path/"a.json").exists() == (code == 0)

def save_real_images(path):
    pixels = load_sample("test").images.permute(0, 2, 3, 1).numpy()
    with path.open("wb") as file: np.savez(file, arr_0=pixels)

def test_samples_are_measured_as_they_are(tmp_path):
    """Options that decide how to draw would have no effect, so they are refused.

    The result is stored beside the samples.
    """
    save_real_images(tmp_path/"real.npz")
    for unused in (("--guidance_scale", 3), ("--checkpoint", tmp_path/"a.pth"), ("--method", "ddim")):
        assert command(*REAL, "--samples", tmp_path/"real.npz", *unused) == 2
    assert not list(tmp_path.glob("*.json"))
    assert command(*REAL, "--samples", tmp_path/"real.npz") == 0 and (tmp_path/"real.json").exists()

def test_endings_in_any_case(tmp_path):
    ".NPZ and .Json mean .npz and .json."
    save_real_images(tmp_path/"real.NPZ")
    assert command(*REAL, "--samples", tmp_path/"real.NPZ", "--output", tmp_path/"a.Json") == 0
    assert json.loads((tmp_path/"a.Json").read_text())["num_images"] == 200
    assert command(*REAL, "--samples", tmp_path/"real.png") == 2
    assert command(*QUICK, "--output", tmp_path/"a.txt") == 2

def test_train_classifier_on_another_device(monkeypatch):
    """Weights, images, labels and losses are on the device that the caller names.

    The loop is replaced: the device of this test has no numbers that it could check.
    """
    asked = []
    def one_step(state, data, objective, config, precision):
        device = next(state.model.parameters()).device
        losses, _ = objective(state.model, *data.batch(torch.arange(4), device), torch.Generator())
        asked.append((device.type, losses.device.type, tuple(losses.shape)))
        return iter([])
    monkeypatch.setattr(metrics, "train_steps", one_step)
    found = train_classifier(load_sample("train"), epochs=1, device="meta")
    assert {weight.device.type for weight in found.state_dict().values()} == {"meta"}
    assert asked == [("meta", "meta", (4,))]
    monkeypatch.undo()
    on_cpu = train_classifier(load_sample("train")[:128], epochs=1)
    assert {weight.device.type for weight in on_cpu.state_dict().values()} == {"cpu"}

def test_extract_features_follows_the_classifier():
    "Images go to the classifier's device, batch by batch. The features come back to the CPU."
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
    assert classifier.places == ["meta"]*2
    assert seen.features.device.type == seen.classes.device.type == "cpu"
    if torch.cuda.is_available():
        images = load_sample("test").images
        here, there = (extract_features(images, load_classifier().to(device)) for device in ("cpu", "cuda"))
        assert there.features.device.type == "cpu"
        assert torch.allclose(here.features, there.features, atol=1e-2)

# --- tools/results.py ---

def test_results_in_quick_form(tmp_path):
    """Every setting and the real images for each seed, with the same figures as `ddpm_evaluate`.

    Copies are found, mirrored ones are not. A second call draws nothing.
    """
    def run():
        return run_script("results.py", "--quick", "--seeds", "2", "--output", "found.json", cwd=tmp_path)
    assert run().count("seed 1") == 6
    result = json.loads((tmp_path/"found.json").read_text())
    rows = {(row["what"], row["seed"]): row for row in result["rows"]}
    assert len(rows) == 12
    assert rows["guidance 2", 0]["frechet_distance"] != rows["guidance 2", 1]["frechet_distance"]
    everywhere = ("--guidance_scale", 2, "--guidance_interval", 0, 1e6, "--eta", 0)
    for what, options in (("guidance 2", everywhere), ("as it comes", ())):
        assert command(*QUICK, *options, "--seed", 1, "--output", tmp_path/"a.json") == 0
        expected = json.loads((tmp_path/"a.json").read_text())["samples"]["frechet_distance"]
        assert rows[what, 1]["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    near = result["nearest"]
    assert set(near["copies"]) == {0} and min(near["copies, one pixel to the right"]) > 0
    assert near["guidance 1.3"] == sorted(near["guidance 1.3"])
    assert run().count("seed") == 0 and json.loads((tmp_path/"found.json").read_text()) == result
