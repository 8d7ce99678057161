"""Make the trained model that comes with the package from a run, its card, and what the lesson on results shows of the run.

usage: python tools/pretrained.py outputs/v1_small

Takes the averaged weights of the run's best checkpoint, writes them in half precision to ddpm_tutorial/assets/small.safetensors, and beside
them small.md: what the run was, and what `ddpm_evaluate` has left in evaluation.json in the run's folder. Curves and all evaluation*.json there
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

A U-Net of {weights:,} weights that draws clothes of 28x28 pixels, class by class. Averaged weights in half precision, with the configuration in the file's metadata
(`load_pretrained("small")`, or `ddpm_sample` without `--checkpoint`).

- Trained on the 60,000 training images of [Fashion-MNIST](https://arxiv.org/abs/1708.07747) (MIT licence) by `ddpm_train --config small`: step {step:,} of {total:,}
  ({epochs:.1f} of {all_epochs} epochs), {precision}, on {device}.
- Validation loss {validation:.4f} (2,000 test images, fixed times and noise; velocity under the cosine schedule).
- Settings: {settings}.
- For learning: the images are small and grey, the classes ten, and nothing was done about what the data leaves out.
- `small.safetensors` has {size:,} bytes, sha256 {sha}.
"""

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    checkpoint = load_checkpoint(run/"checkpoints"/"best_model.pth")
    config, step, metrics = checkpoint["config"], checkpoint["step"], read_metrics(run)
    changed = [name for name in differences(config, PRESETS["small"]) if name.startswith(("model.", "scheduler.", "train.", "data"))]
    if changed: raise SystemExit(f"this is not the preset small: {', '.join(changed)} differ")
    save_weights(PRETRAINED["small"], checkpoint["ema"], PRESETS["small"]) # how it samples may have been decided after it was trained
    stored, start = PRETRAINED["small"].read_bytes(), next(line for line in metrics if "device" in line)
    total = total_steps(config.train, 60_000)
    card = CARD.format(weights=sum(weight.numel() for weight in checkpoint["ema"].values()), step=step, total=total, epochs=step/total*config.train.epochs,
                       all_epochs=config.train.epochs, precision=start["precision"], device=start["device"],
                       validation=next(line["validation_loss"] for line in metrics if line["step"] == step and "validation_loss" in line),
                       settings=", ".join(f"{name} {value}" for part in ("scheduler", "train") for name, value in asdict(getattr(config, part)).items()),
                       size=len(stored), sha=hashlib.sha256(stored).hexdigest())
    evaluation = run/"evaluation.json"
    if evaluation.exists():
        found = json.loads(evaluation.read_text())
        card += (f"\n## Evaluation\n\n{found['num_images']:,} samples ({found['what']}) against {found['num_reference']:,} training images; \"real\" are as many test images that no model has seen.\n\n"
                 "| | samples | real |\n|---|---|---|\n" + "".join(f"| {name.replace('_', ' ')} | {value:.4g} | {found['real'][name]:.4g} |\n" for name, value in found["samples"].items()))
    PRETRAINED["small"].with_suffix(".md").write_text(card)
    lines = [line for line in metrics if "device" in line or "validation_loss" in line or line["step"] % 100 == 0]
    evaluations = [json.loads(path.read_text()) for path in sorted(run.glob("evaluation*.json"))]
    (Path(__file__).resolve().parent.parent/"nbs"/"small.json").write_text(json.dumps(dict(metrics=lines, evaluations=evaluations), indent=1) + "\n")
    print(card)

if __name__ == "__main__": main()
