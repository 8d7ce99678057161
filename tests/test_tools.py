"The scripts that measure for hours, with --quick: they run, continue, and write what they found."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from ddpm_tutorial.data import load_sample
from ddpm_tutorial.run.checkpoint import load_model

TOOLS = Path(__file__).parent.parent/"tools"

def run(script, *options, cwd):
    done = subprocess.run([sys.executable, TOOLS/script, *options], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

def test_sampling_quality(tmp_path):
    """Every method and the real images.

    A second call draws nothing again, and other settings need another file.
    """
    command = ["sampling_quality.py", "--quick", "--seeds", "1", "--output", "found.json"]
    said = run(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"found.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    methods = {"real", "ddpm", "ddim", "dpm++", "heun", "dpm++ whole stride"}
    methods |= {f"{method} {spacing}" for method in ("ddim", "dpm++") for spacing in ("log_snr", "karras")}
    methods.add("ddim trailing")
    assert rows.keys() == methods and result["num_samples"] == 40
    assert all(row["frechet_distance"] > 0 and 0 <= row["class_agreement"] <= 1 for row in rows.values())
    assert f"{rows['ddim']['frechet_distance']:.4f}" in said
    assert "seed 0" not in run(*command, cwd=tmp_path)
    assert json.loads((tmp_path/"found.json").read_text()) == result
    (tmp_path/"found.json").write_text(json.dumps(result | {"guidance_scale": 9.}))
    again = [sys.executable, TOOLS/command[0], *command[1:]]
    other = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 1 and "other settings" in other.stderr

def test_ablation(tmp_path):
    """Each variant differs from the recipe by the options that it names.

    The raw weights are those of the recipe's run.
    """
    said = run("ablation.py", "--quick", cwd=tmp_path)
    folder = tmp_path/"outputs"/"ablation_quick"
    recipe, batches, raw = json.loads((folder/"ablation.json").read_text())["rows"]
    settings = [json.loads((folder/name/"config.json").read_text())["train"] for name in ("0-0", "1-0")]
    different = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert different == {"batch_size", "warmup_steps"}
    assert "averaged weights" in recipe["what"]
    assert "raw weights" in raw["what"] and raw["validation_loss"] is None
    assert said.count("ddpm_tutorial.run.train ") == 2 and said.count("ddpm_tutorial.run.evaluate ") == 3
    assert recipe["validation_loss"] > 0 and 0 <= batches["class_agreement"] <= 1

def test_guidance(tmp_path):
    "Every way of guiding at every scale, beside real images; a second call measures nothing again."
    command = ["guidance.py", "--quick", "--seeds", "1", "--output", "found.json"]
    said = run(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"found.json").read_text())
    ways = {row["way"] for row in result["rows"]}
    assert {"everywhere", "rescaled", "away from an early checkpoint"} < ways and result["num_samples"] == 40
    assert len(result["rows"]) == len({(row["way"], row["scale"]) for row in result["rows"]})
    assert 0 < result["real"]["frechet_distance"] and said.count("seed 0") == len(result["rows"])
    assert "seed 0" not in run(*command, cwd=tmp_path)

def test_likelihood(tmp_path):
    "Bound, flow, coders and the learned variance, with means and standard errors."
    run("likelihood.py", "--quick", "--output", "found.json", cwd=tmp_path)
    found = json.loads((tmp_path/"found.json").read_text())
    for name in ("bound", "bound_of_flow_images", "bound_8_times_finer", "bound_with_learned_variance"):
        parts = found[name]
        total = sum(parts[part][0] for part in ("prior", "diffusion", "reconstruction"))
        assert abs(parts["total"][0] - total) < 1e-6 and 1 < total < 8 and parts["total"][1] > 0
    assert all(3 < bits < 8 for bits in found["coders"].values())
    assert 0 < found["label_bits"] < 0.01 and found["num_images"] == 20

def test_emoji(tmp_path):
    "It trains if there is no checkpoint, and leaves figures and samples. A second call trains no more."
    command = ["resolution.py", "--quick", "--output", "found.json"]
    run(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"found.json").read_text())
    assert [row["patch_size"] for row in result["patches"]] == [1, 2, 4] and result["step"] == 2
    assert {(row["kind"], row["size"]) for row in result["attention"]} == {
        (kind, size) for kind in ("self", "linear") for size in (8, 16)}
    with np.load(tmp_path/"found.npz") as arrays:
        assert arrays["images"].shape == (18, 3, 64, 64)
        assert arrays["labels"].tolist() == sorted([*range(9)]*2)
    checkpoint = tmp_path/"outputs"/"emoji64_quick"/"checkpoints"/"best_model.pth"
    before = checkpoint.stat().st_mtime_ns
    run(*command, cwd=tmp_path)
    assert checkpoint.stat().st_mtime_ns == before

def test_distill(tmp_path):
    "A student for each stage, measured beside its teacher; a second call trains and measures nothing again."
    command = ["distill.py", "--quick", "--stages", "2", "1", "--output_dir", "out"]
    said = run(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"out"/"distill.json").read_text())
    assert [(row["name"], row["steps"]) for row in result["rows"]] == [
        ("teacher", 2), ("student of 2", 2), ("student of 1", 1)]
    assert result["training_seconds"].keys() == {"2", "1"} and "student of 1, seed 0" in said
    for steps in (2, 1):
        assert load_model(tmp_path/"out"/f"{steps}_steps.safetensors")[1].student_steps == steps
    before = (tmp_path/"out"/"2_steps.safetensors").stat().st_mtime_ns
    assert "seed 0" not in run(*command, cwd=tmp_path)
    assert (tmp_path/"out"/"2_steps.safetensors").stat().st_mtime_ns == before

def test_generalisation(tmp_path):
    "Two halves without a common image: a row for each, and how far their samples lie apart."
    run("generalisation.py", "--quick", "--only", "100 a", "100 b", "--output_dir", "out", cwd=tmp_path)
    found = json.loads((tmp_path/"out"/"generalisation.json").read_text())
    assert [(row["name"], row["images"], len(row["looks"])) for row in found["rows"]] == [
        ("100 a", 100, 2), ("100 b", 100, 2)]
    assert all(0 <= look["closer"] <= 1 for row in found["rows"] for look in row["looks"])
    assert found["halves"].keys() == {"100"} and found["halves"]["100"]["same_noise"] > 0
    with np.load(tmp_path/"out"/"generalisation.npz") as arrays:
        assert arrays["100 a"].shape == (20, 1, 28, 28)
    sys.path.insert(0, str(TOOLS))
    try: import generalisation
    finally: sys.path.remove(str(TOOLS))
    data = load_sample()
    mine, other = generalisation.images_for("100 a", data)
    theirs, _ = generalisation.images_for("100 b", data)
    assert torch.equal(theirs.images, other.images)
    def seen(part): return {image.numpy().tobytes() for image in part.images}
    assert not seen(mine) & seen(theirs)
