"""The scripts that train for hours, with --quick: they run, continue, and write what they found.

A file of its own, so that it can run beside test_tools.py.
"""
import json
import sys

import numpy as np
import torch
from scripts import TOOLS, run_script

from ddpm_tutorial.data import load_sample
from ddpm_tutorial.run.checkpoint import load_model


def test_ablation(tmp_path):
    """Each variant differs from the recipe by the options that it names.

    The raw weights are those of the recipe's run.
    """
    said = run_script("ablation.py", "--quick", cwd=tmp_path)
    folder = tmp_path/"outputs"/"ablation_quick"
    recipe, batches, raw = json.loads((folder/"ablation.json").read_text())["rows"]
    settings = [json.loads((folder/name/"config.json").read_text())["train"] for name in ("0-0", "1-0")]
    different = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert different == {"batch_size", "warmup_steps"}
    assert "averaged weights" in recipe["what"]
    assert "raw weights" in raw["what"] and raw["validation_loss"] is None
    assert said.count("ddpm_tutorial.run.train ") == 2 and said.count("ddpm_tutorial.run.evaluate ") == 3
    assert recipe["validation_loss"] > 0 and 0 <= batches["class_agreement"] <= 1

def test_emoji(tmp_path):
    "It trains if there is no checkpoint, and leaves figures and samples. A second call trains no more."
    command = ["resolution.py", "--quick", "--output", "found.json"]
    run_script(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"found.json").read_text())
    assert [row["patch_size"] for row in result["patches"]] == [1, 2, 4] and result["step"] == 2
    assert {(row["kind"], row["size"]) for row in result["attention"]} == {
        (kind, size) for kind in ("self", "linear") for size in (8, 16)}
    with np.load(tmp_path/"found.npz") as arrays:
        assert arrays["images"].shape == (18, 3, 64, 64)
        assert arrays["labels"].tolist() == sorted([*range(9)]*2)
    checkpoint = tmp_path/"outputs"/"emoji64_quick"/"checkpoints"/"best_model.pth"
    before = checkpoint.stat().st_mtime_ns
    run_script(*command, cwd=tmp_path)
    assert checkpoint.stat().st_mtime_ns == before

def test_distill(tmp_path):
    "A student for each stage, measured beside its teacher; a second call trains and measures nothing again."
    command = ["distill.py", "--quick", "--stages", "2", "1", "--output_dir", "out"]
    said = run_script(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"out"/"distill.json").read_text())
    assert [(row["name"], row["steps"]) for row in result["rows"]] == [
        ("teacher", 2), ("student of 2", 2), ("student of 1", 1)]
    assert result["training_seconds"].keys() == {"2", "1"} and "student of 1, seed 0" in said
    for steps in (2, 1):
        assert load_model(tmp_path/"out"/f"{steps}_steps.safetensors")[1].student_steps == steps
    before = (tmp_path/"out"/"2_steps.safetensors").stat().st_mtime_ns
    assert "seed 0" not in run_script(*command, cwd=tmp_path)
    assert (tmp_path/"out"/"2_steps.safetensors").stat().st_mtime_ns == before

def test_generalisation(tmp_path):
    "Two halves without a common image: a row for each, and how far their samples lie apart."
    command = ["generalisation.py", "--quick", "--only", "100 a", "100 b", "--output_dir", "out"]
    run_script(*command, cwd=tmp_path)
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
