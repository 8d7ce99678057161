"""Makes the trained model that comes with the package from a run, with its card, and what the lesson on
results shows of the run.

usage: python tools/pretrained.py outputs/v1_small
       python tools/pretrained.py --evaluations outputs/small

Takes the averaged weights of the run's best checkpoint and writes them in half precision to
ddpm_tutorial/assets/small.safetensors. Beside them it writes small.md: what the run was, and what
`ddpm_evaluate` left in evaluation.json in the run's folder. Curves and every evaluation*.json in that folder
go to nbs/small.json.

Without a run the weights stay. They get the preset's settings of sampling, and the evaluations in the card
and in nbs/small.json are replaced by those in the folder.
"""
import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from ddpm_tutorial.run.checkpoint import PRETRAINED, load_checkpoint, load_weights, save_weights
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
- `small.safetensors` has {facts}.
"""

EVALUATION = """
## Evaluation

{num_images:,} samples ({what}) against {num_reference:,} training images; \
"real" are as many test images that no model has seen.

| | samples | real |
|---|---|---|
"""

def facts(path):
    "What the card says of a file."
    stored = path.read_bytes()
    return f"{len(stored):,} bytes, sha256 {hashlib.sha256(stored).hexdigest()}"

def describe_run(checkpoint, metrics):
    "The top of the card: the run, its settings, and the stored file."
    config, step = checkpoint["config"], checkpoint["step"]
    start = next(line for line in metrics if "device" in line)
    losses = [line["validation_loss"] for line in metrics
              if line["step"] == step and "validation_loss" in line]
    settings = asdict(config.scheduler) | asdict(config.train)
    total = total_steps(config.train, 60_000)
    return CARD.format(
        weights=sum(weight.numel() for weight in checkpoint["ema"].values()), step=step, total=total,
        epochs=step/total*config.train.epochs, all_epochs=config.train.epochs,
        precision=start["precision"], device=start["device"], validation=losses[0],
        settings=", ".join(f"{name} {value}" for name, value in settings.items()),
        facts=facts(PRETRAINED["small"]))

def describe_evaluation(found):
    "The end of the card: each measure for the samples, and for real images."
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} | {found['real'][name]:.4g} |\n"
            for name, value in found["samples"].items()]
    return EVALUATION.format(**found) + "".join(rows)

STORED = Path(__file__).resolve().parent.parent/"nbs"/"small.json"

def write_evaluations(card, lines, folder):
    "The card with its evaluation, and what the lessons read: the lines of the run, and all evaluations."
    paths = sorted(folder.glob("evaluation*.json"))
    evaluations = {path.name: json.loads(path.read_text()) for path in paths}
    if "evaluation.json" in evaluations: card += describe_evaluation(evaluations["evaluation.json"])
    PRETRAINED["small"].with_suffix(".md").write_text(card)
    stored = dict(metrics=lines, evaluations=list(evaluations.values()))
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
    print(card)

def change_sampling(folder):
    "The stored weights with the preset's settings of sampling, and new evaluations."
    if not (folder/"evaluation.json").exists(): raise SystemExit(f"there is no evaluation.json in {folder}")
    path, small = PRETRAINED["small"], PRESETS["small"]
    stored = load_weights(path)
    changed = [name for name in differences(stored["config"], small) if not name.startswith("sampling.")]
    if changed: raise SystemExit(f"these weights are not of the preset small: {', '.join(changed)} differ")
    card, before = path.with_suffix(".md").read_text(), facts(path)
    if before not in card: raise SystemExit(f"the card does not say that the weights have {before}")
    save_weights(path, stored["ema"], small)
    card = card.partition("\n## Evaluation\n")[0].replace(before, facts(path))
    write_evaluations(card, json.loads(STORED.read_text())["metrics"], folder)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--evaluations", type=Path, default=None)
    args = parser.parse_args()
    run, evaluations = args.run, args.evaluations
    if (run is None) == (evaluations is None): parser.error("name a run, or --evaluations with a folder")
    if run is None: return change_sampling(evaluations)
    checkpoint, metrics = load_checkpoint(run/"checkpoints"/"best_model.pth"), read_metrics(run)
    # settings of sampling may differ: they can be chosen after the training
    parts = ("model.", "scheduler.", "train.", "data")
    changed = [name for name in differences(checkpoint["config"], PRESETS["small"]) if name.startswith(parts)]
    if changed: raise SystemExit(f"this run is not one of the preset small: {', '.join(changed)} differ")
    save_weights(PRETRAINED["small"], checkpoint["ema"], PRESETS["small"])
    lines = [line for line in metrics
             if "device" in line or "validation_loss" in line or line["step"] % 100 == 0]
    write_evaluations(describe_run(checkpoint, metrics), lines, run)

if __name__ == "__main__": main()
