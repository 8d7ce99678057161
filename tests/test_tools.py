"The scripts that measure for hours, with --quick: they run, continue, and write what they found."
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from scripts import TOOLS, run_script

from ddpm_tutorial.run.checkpoint import PRETRAINED, load_weights, save_weights
from ddpm_tutorial.run.config import PRESETS, SamplingConfig


def test_sampling_quality(tmp_path):
    """Every method and the real images.

    A second call draws nothing again, and other settings need another file.
    """
    command = ["sampling_quality.py", "--quick", "--seeds", "1", "--output", "found.json"]
    said = run_script(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"found.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    methods = {"real", "ddpm", "ddim", "dpm++", "heun", "dpm++ whole stride"}
    methods |= {f"{method} {spacing}" for method in ("ddim", "dpm++") for spacing in ("log_snr", "karras")}
    methods |= {"ddim trailing", "dpm++ eta 0.7", "dpm++ eta 1"}
    assert rows.keys() == methods and result["num_samples"] == 40
    assert all(row["frechet_distance"] > 0 and 0 <= row["class_agreement"] <= 1 for row in rows.values())
    assert f"{rows['ddim']['frechet_distance']:.4f}" in said
    assert "seed 0" not in run_script(*command, cwd=tmp_path)
    assert json.loads((tmp_path/"found.json").read_text()) == result
    (tmp_path/"found.json").write_text(json.dumps(result | {"guidance_scale": 9.}))
    again = [sys.executable, TOOLS/command[0], *command[1:]]
    other = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 1 and "other settings" in other.stderr

def test_guidance(tmp_path):
    "Every way of guiding at every scale, beside real images; a second call measures nothing again."
    command = ["guidance.py", "--quick", "--seeds", "1", "--output", "found.json"]
    said = run_script(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"found.json").read_text())
    ways = {row["way"] for row in result["rows"]}
    assert {"everywhere", "rescaled", "away from an early checkpoint"} < ways and result["num_samples"] == 40
    assert len(result["rows"]) == len({(row["way"], row["scale"]) for row in result["rows"]})
    assert 0 < result["real"]["frechet_distance"] and said.count("seed 0") == len(result["rows"])
    assert "seed 0" not in run_script(*command, cwd=tmp_path)

def test_likelihood(tmp_path):
    "Bound, flow, coders and the learned variance, with means and standard errors."
    run_script("likelihood.py", "--quick", "--output", "found.json", cwd=tmp_path)
    found = json.loads((tmp_path/"found.json").read_text())
    for name in ("bound", "bound_of_flow_images", "bound_8_times_finer", "bound_with_learned_variance"):
        parts = found[name]
        total = sum(parts[part][0] for part in ("prior", "diffusion", "reconstruction"))
        assert abs(parts["total"][0] - total) < 1e-6 and 1 < total < 8 and parts["total"][1] > 0
    assert all(3 < bits < 8 for bits in found["coders"].values())
    assert 0 < found["label_bits"] < 0.01 and found["num_images"] == 20

def test_pretrained_takes_the_settings_of_the_preset(tmp_path, monkeypatch, capsys):
    "Without a run the weights stay; their settings of sampling, the card and the evaluations are new."
    monkeypatch.syspath_prepend(TOOLS)
    pretrained = importlib.import_module("pretrained")
    weights, stored = tmp_path/"small.safetensors", tmp_path/"small.json"
    before = load_weights(PRETRAINED["small"])
    save_weights(weights, before["ema"], replace(before["config"], sampling=SamplingConfig()))
    monkeypatch.setitem(PRETRAINED, "small", weights)
    monkeypatch.setattr(pretrained, "STORED", stored)
    stored.write_text(json.dumps({"metrics": [{"step": 1}], "evaluations": []}))
    def facts(): return f"{weights.stat().st_size:,} bytes, sha256 {sha256(weights.read_bytes()).hexdigest()}"
    weights.with_suffix(".md").write_text(f"It has {facts()}.\n\n## Evaluation\n\nold\n")
    with pytest.raises(SystemExit, match="no evaluation.json"): pretrained.change_sampling(tmp_path)
    found = dict(num_images=20, num_reference=100, what="drawn", samples={"coverage": 0.5},
                 real={"coverage": 0.6})
    (tmp_path/"evaluation.json").write_text(json.dumps(found))
    pretrained.change_sampling(tmp_path)
    after, card = load_weights(weights), weights.with_suffix(".md").read_text()
    assert after["config"] == PRESETS["small"]
    assert all(torch.equal(after["ema"][name], weight) for name, weight in before["ema"].items())
    assert f"It has {facts()}." in card and "| coverage | 0.5 | 0.6 |" in card and "old" not in card
    assert json.loads(stored.read_text()) == {"metrics": [{"step": 1}], "evaluations": [found]}
