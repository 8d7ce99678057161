"""Makes the trained model that comes with the package from a run, with its card, and what the lesson on
results shows of the run.

usage: python tools/pretrained.py outputs/v1_small

Takes the averaged weights of the run's best checkpoint and writes them in half precision to
ddpm_tutorial/assets/small.safetensors. Beside them it writes small.md: what the run was, and what
`ddpm_evaluate` left in evaluation.json in the run's folder. Curves and every evaluation*.json in that folder
go to nbs/small.json.
"""
import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from ddpm_tutorial.run.checkpoint import PRETRAINED, load_checkpoint, save_weights
from ddpm_tutorial.run.config import PRESETS, differences
from ddpm_tutorial.run.tracking import read_metrics
from ddpm_tutorial.training import total_steps

CARD = """# The trained `small`

A U-Net of {weights:,} weights that draws clothes of 28x28 pixels, class by class. Averaged weights in half \
precision, with the configuration in the file's metadata
(`load_pretrained("small")`, or `ddpm_sample` without `--checkpoint`).

- Trained on the 60,000 training images of [Fashion-MNIST](https://arxiv.org/abs/1708.07747) (MIT licence) \
by `ddpm_train --config small`: step {step:,} of {total:,}
  ({epochs:.1f} of {all_epochs} epochs), {precision}, on {device}.
- Validation loss {validation:.4f} (2,000 test images, fixed times and noise; \
velocity under the cosine schedule).
- Settings: {settings}.
- For learning: the images are small and grey, the classes ten, \
and nothing was done about what the data leaves out.
- `small.safetensors` has {size:,} bytes, sha256 {sha}.
"""

EVALUATION = """
## Evaluation

{num_images:,} samples ({what}) against {num_reference:,} training images; \
"real" are as many test images that no model has seen.

| | samples | real |
|---|---|---|
"""

def describe_run(checkpoint, metrics):
    "The top of the card: the run, its settings, and the stored file."
    config, step = checkpoint["config"], checkpoint["step"]
    start = next(line for line in metrics if "device" in line)
    losses = [line["validation_loss"] for line in metrics
              if line["step"] == step and "validation_loss" in line]
    settings = asdict(config.scheduler) | asdict(config.train)
    stored, total = PRETRAINED["small"].read_bytes(), total_steps(config.train, 60_000)
    return CARD.format(
        weights=sum(weight.numel() for weight in checkpoint["ema"].values()), step=step, total=total,
        epochs=step/total*config.train.epochs, all_epochs=config.train.epochs,
        precision=start["precision"], device=start["device"], validation=losses[0],
        settings=", ".join(f"{name} {value}" for name, value in settings.items()),
        size=len(stored), sha=hashlib.sha256(stored).hexdigest())

def describe_evaluation(found):
    "The end of the card: each measure for the samples, and for real images."
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} | {found['real'][name]:.4g} |\n"
            for name, value in found["samples"].items()]
    return EVALUATION.format(**found) + "".join(rows)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    checkpoint, metrics = load_checkpoint(run/"checkpoints"/"best_model.pth"), read_metrics(run)
    # settings of sampling may differ: they can be chosen after the training
    parts = ("model.", "scheduler.", "train.", "data")
    changed = [name for name in differences(checkpoint["config"], PRESETS["small"]) if name.startswith(parts)]
    if changed: raise SystemExit(f"this run is not one of the preset small: {', '.join(changed)} differ")
    save_weights(PRETRAINED["small"], checkpoint["ema"], PRESETS["small"])
    card = describe_run(checkpoint, metrics)
    evaluation = run/"evaluation.json"
    if evaluation.exists(): card += describe_evaluation(json.loads(evaluation.read_text()))
    PRETRAINED["small"].with_suffix(".md").write_text(card)
    lines = [line for line in metrics
             if "device" in line or "validation_loss" in line or line["step"] % 100 == 0]
    evaluations = [json.loads(path.read_text()) for path in sorted(run.glob("evaluation*.json"))]
    small = json.dumps(dict(metrics=lines, evaluations=evaluations), indent=1) + "\n"
    (Path(__file__).resolve().parent.parent/"nbs"/"small.json").write_text(small)
    print(card)

if __name__ == "__main__": main()
