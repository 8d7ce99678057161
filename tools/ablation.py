"""What each choice in the recipe of `small` is worth: short trainings that differ in one choice, each measured by `ddpm_evaluate`.

usage: python tools/ablation.py [--epochs 1] [--num_samples 1000] [--output_dir DIR] [--docs] [--quick]

Three quarters of an hour on two cores. Every run is the commands that it prints; a second call goes on where the first one ended. --docs writes nbs/ablation.json;
--quick trains a few steps on the bundled images: it shows that the script works, its figures mean nothing.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

VARIANTS = {
    "the recipe": "",
    "batches of 128, the default": "--batch_size 128 --warmup_steps 200",    # as many images of warm-up
    "learning rate 2e-4, the default": "--lr 2e-4",
    "learning rate that stays": "--no-lr_decay",
    "predicts the noise": "--prediction_type epsilon",
    "linear schedule of 1,000 steps": "--schedule linear --num_steps 1000",
    "one more block up on each level": "--no-mirrored",
    "a group of each norm for each channel": "--num_groups 32",    # of the first level; 32 groups is the usual number
    "attention at 14x14 as well": "--attention_resolutions 14",
    "fp32": "--precision fp32",
}
RAW = "raw instead of averaged weights"   # measured on the recipe's own run

def run(module, options):
    print(f"python -m ddpm_tutorial.run.{module} {options}", flush=True)
    subprocess.run([sys.executable, "-m", f"ddpm_tutorial.run.{module}", *options.split()], check=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs into the docs")
    data, few_steps, few_calls = ("--data sample", " --max_steps 2", " --num_inference_steps 2") if args.quick else ("--data fashion_mnist", "", "")
    variants = list(VARIANTS.items())[:2 if args.quick else None]
    if args.quick: args.num_samples = 20
    rows = []
    for i, (name, options) in enumerate([*variants, (RAW, "--no-use_ema")]):
        folder = args.output_dir/f"{0 if name == RAW else i}"
        result = args.output_dir/f"{i}.json"
        if not (folder/"checkpoints"/"best_model.pth").exists():
            stopped = " --resume"*any((folder/"checkpoints").glob("*.pth"))
            run("train", f"--config small {data} --epochs {args.epochs}{few_steps} --no-wandb --output_dir {folder} {options}{stopped}")
        if not result.exists():
            run("evaluate", f"--checkpoint {folder}/checkpoints/best_model.pth --num_samples {args.num_samples} --output {result} {data}{few_calls}" + f" {options}"*(name == RAW))
        lines = [json.loads(line) for line in (folder/"metrics.jsonl").read_text().splitlines()]
        found, loss = json.loads(result.read_text()), next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)
        comparable = name != RAW and "prediction_type" not in options and "schedule" not in options   # else it is the loss of something else
        rows.append(dict(name=name, options=options, what=found["what"], validation_loss=loss if comparable else None, **found["samples"]))
        table = dict(epochs=args.epochs, num_samples=args.num_samples, real=found["real"], rows=rows)
        for path in [args.output_dir/"ablation.json"] + [Path(__file__).resolve().parent.parent/"nbs"/"ablation.json"]*args.docs:
            path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"\n{args.epochs} epochs, {args.num_samples:,} samples; Fréchet distance of as many real images {found['real']['frechet_distance']:.3f}")
    for row in rows: print(f"{row['name']:34} validation loss {row['validation_loss'] or '-'!s:6.6}, class agreement {row['class_agreement']:.3f}, Fréchet distance {row['frechet_distance']:.3f}")

if __name__ == "__main__": main()
