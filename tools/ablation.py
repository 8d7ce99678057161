"""What is each choice in the recipe of `small` worth? Short trainings that differ in one choice, each
measured by `ddpm_evaluate`.

usage: python tools/ablation.py [--epochs 1] [--num_samples 1000] [--output_dir DIR] [--docs] [--quick]

Takes three quarters of an hour on two cores. The script prints every command that it runs. If it is stopped,
call it again and it continues where it ended. --docs writes nbs/ablation.json. --quick trains for a few steps
on the bundled images: it shows that the script works, but its figures mean nothing.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

VARIANTS = {
    "the recipe": "",
    "batches of 128, the default": "--batch_size 128 --warmup_steps 200",    # the warm-up sees as many images
    "learning rate 2e-4, the default": "--lr 2e-4",
    "learning rate that stays": "--no-lr_decay",
    "predicts the noise": "--prediction_type epsilon",
    "linear schedule of 1,000 steps": "--schedule linear --num_steps 1000",
    "one more block up on each level": "--no-mirrored",
    "a group of each norm for each channel": "--num_groups 32",    # on the first level; 32 groups are usual
    "attention at 14x14 as well": "--attention_resolutions 14",
    "fp32": "--precision fp32",
}
RAW = "raw instead of averaged weights"   # measured on the recipe's own run

def run(module, options):
    print(f"python -m ddpm_tutorial.run.{module} {options}", flush=True)
    subprocess.run([sys.executable, "-m", f"ddpm_tutorial.run.{module}", *options.split()], check=True)

def train(folder, options, epochs, quick):
    "Trains a variant, unless its best checkpoint exists. Continues a run that was stopped."
    if (folder/"checkpoints"/"best_model.pth").exists(): return
    data = "--data sample" if quick else "--data fashion_mnist"
    few_steps = " --max_steps 2" if quick else ""
    resume = " --resume" if any((folder/"checkpoints").glob("*.pth")) else ""
    where = f"--output_dir {folder} {options}{resume}"
    run("train", f"--config small {data} --epochs {epochs}{few_steps} --no-wandb {where}")

def evaluate(folder, result, options, num_samples, quick):
    "Measures the samples of a run, unless the result exists."
    if result.exists(): return
    data = "--data sample --num_inference_steps 2" if quick else "--data fashion_mnist"
    options = f"--num_samples {num_samples} --output {result} {data}{options}"
    run("evaluate", f"--checkpoint {folder}/checkpoints/best_model.pth {options}")

def last_validation_loss(folder):
    lines = [json.loads(line) for line in (folder/"metrics.jsonl").read_text().splitlines()]
    return next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)

def measure(i, name, options, args):
    "Trains and evaluates variant number i. Returns its row of the table, and what real images reach."
    raw = name == RAW
    folder = args.output_dir/("0" if raw else str(i))
    result = args.output_dir/f"{i}.json"
    train(folder, options, args.epochs, args.quick)
    evaluate(folder, result, f" {options}" if raw else "", args.num_samples, args.quick)
    found = json.loads(result.read_text())
    # with another target or schedule, the loss measures something else
    comparable = not raw and "prediction_type" not in options and "schedule" not in options
    loss = last_validation_loss(folder) if comparable else None
    row = dict(name=name, options=options, what=found["what"], validation_loss=loss, **found["samples"])
    return row, found["real"]

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs in the docs")
    if args.quick: args.num_samples = 20
    return args

def main():
    args = parse_arguments()
    variants = list(VARIANTS.items())
    if args.quick: variants = variants[:2]
    paths = [args.output_dir/"ablation.json"]
    if args.docs: paths.append(Path(__file__).resolve().parent.parent/"nbs"/"ablation.json")
    rows = []
    for i, (name, options) in enumerate([*variants, (RAW, "--no-use_ema")]):
        row, real = measure(i, name, options, args)
        rows.append(row)
        table = dict(epochs=args.epochs, num_samples=args.num_samples, real=real, rows=rows)
        for path in paths: path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"\n{args.epochs} epochs, {args.num_samples:,} samples; "
          f"Fréchet distance of as many real images {real['frechet_distance']:.3f}")
    for row in rows:
        print(f"{row['name']:34} validation loss {row['validation_loss'] or '-'!s:6.6}, "
              f"class agreement {row['class_agreement']:.3f}, Fréchet distance {row['frechet_distance']:.3f}")

if __name__ == "__main__": main()
