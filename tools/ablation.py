"""What is each choice in the recipe of a preset worth? Trainings that differ in one choice, each measured by
`ddpm_evaluate`.

usage: python tools/ablation.py [small | tiny] [--epochs 1] [--seeds 1] [--num_samples 1000]
                                [--output_dir DIR] [--docs] [--quick]

`small` trains each variant for one epoch: three quarters of an hour on two cores. `tiny` trains every variant
to its end, and the best with a single change with two more seeds: an hour. The script prints every command
that it runs. If it is stopped, call it again and it continues where it ended. --docs writes nbs/ablation.json
or nbs/objectives.json. --quick trains for a few steps on the bundled images: it shows that the script works,
but its figures mean nothing.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from ddpm_tutorial.metrics import paired_difference

RECIPE = "the recipe"
RAW = "raw instead of averaged weights"     # measured on the recipe's own run
# `tiny` as it was before its times were chosen by this experiment
UNIFORM, SHORT = "--max_steps 1500 --time_distribution uniform", "--max_steps 1500"
STRAIGHT = "--schedule flow --prediction_type flow"
VARIANTS = {"small": {
    RECIPE: "",
    "batches of 128, the default": "--batch_size 128 --warmup_steps 200",    # the warm-up sees as many images
    "learning rate 2e-4, the default": "--lr 2e-4",
    "learning rate that stays": "--no-lr_decay",
    "predicts the noise": "--prediction_type epsilon",
    "linear schedule of 1,000 steps": "--schedule linear --num_steps 1000",
    "one more block up on each level": "--no-mirrored",
    "a group of each norm for each channel": "--num_groups 32",    # on the first level; 32 groups are usual
    "attention at 14x14 as well": "--attention_resolutions 14",
    "fp32": "--precision fp32",
    RAW: "--no-use_ema",
}, "tiny": {
    RECIPE: UNIFORM,
    "weight min(SNR, 5)": f"{UNIFORM} --loss_weight min_snr",
    "logit-normal times": f"{SHORT} --time_distribution logit_normal",
    "lognormal times": f"{SHORT} --time_distribution lognormal",
    "no signal at the last time": f"{UNIFORM} --zero_terminal_snr",
    "predicts the noise": f"{UNIFORM} --prediction_type epsilon",
    "predicts the noise, weight min(SNR, 5)": f"{UNIFORM} --prediction_type epsilon --loss_weight min_snr",
    "predicts the image": f"{UNIFORM} --prediction_type sample",
    "straight path, predicts the flow": f"{UNIFORM} {STRAIGHT}",
    "straight path, logit-normal times": f"{SHORT} {STRAIGHT} --time_distribution logit_normal",
    "straight path, lognormal times": f"{SHORT} {STRAIGHT} --time_distribution lognormal",
    "lognormal times, weight min(SNR, 5)": f"{SHORT} --time_distribution lognormal --loss_weight min_snr",
}}
REPEATED = {RECIPE, "lognormal times"}  # for all seeds: what beats the recipe by most with a single change
OUTPUTS = {"small": "ablation.json", "tiny": "objectives.json"}

def run(module, options):
    print(f"python -m ddpm_tutorial.run.{module} {options}", flush=True)
    subprocess.run([sys.executable, "-m", f"ddpm_tutorial.run.{module}", *options.split()], check=True)

def train(folder, options, args):
    "Trains a variant, unless that is done. Continues a run that was stopped."
    if (folder/"done").exists(): return
    data = "--data sample" if args.quick else "--data fashion_mnist"
    if args.epochs: options += f" --epochs {args.epochs}"
    if args.quick: options = f"{options.removeprefix(SHORT)} --max_steps 2"
    if any((folder/"checkpoints").glob("*.pth")): options += " --resume"
    run("train", f"--config {args.preset} {data} --no-wandb --output_dir {folder} {options}")
    (folder/"done").touch()

def evaluate(folder, result, options, args):
    "Measures the samples of a run, unless the result exists."
    if result.exists(): return
    data = "--data sample --num_inference_steps 2" if args.quick else "--data fashion_mnist"
    # the rows that are stored were drawn before `small` had an interval and an eta
    if args.preset == "small": options += " --guidance_scale 1.3 --guidance_interval 0 1e6 --eta 0"
    options = f"--num_samples {args.num_samples} --output {result} {data} {options}"
    run("evaluate", f"--checkpoint {folder}/checkpoints/best_model.pth {options}")

def last_validation_loss(folder):
    lines = [json.loads(line) for line in (folder/"metrics.jsonl").read_text().splitlines()]
    return next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)

def measure(i, name, options, seed, args):
    "Trains and evaluates variant number i. Returns its row of the table, and what real images reach."
    raw = name == RAW
    folder = args.output_dir/(f"0-{seed}" if raw else f"{i}-{seed}")
    result = args.output_dir/f"{i}-{seed}.json"
    train(folder, f"{'' if raw else options} --seed {seed}", args)
    evaluate(folder, result, f"--seed {seed} {options if raw else ''}", args)
    found = json.loads(result.read_text())
    # with another target or schedule, the loss measures something else
    comparable = not raw and not any(word in options for word in ("prediction_type", "schedule", "terminal"))
    loss = last_validation_loss(folder) if comparable else None
    row = dict(name=name, options=options, seed=seed, what=found["what"], validation_loss=loss,
               **found["samples"])
    return row, found["real"]

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=list(VARIANTS), default="small")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--output_dir", type=Path, default=None)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs in the docs")
    if args.quick: args.num_samples = 20
    if args.epochs is None and args.preset == "small": args.epochs = 1
    if args.seeds is None: args.seeds = 3 if args.preset == "tiny" and not args.quick else 1
    if args.output_dir is None:
        name = OUTPUTS[args.preset].removesuffix(".json")
        args.output_dir = Path("outputs")/(f"{name}_quick" if args.quick else name)
    return args

def print_table(args, rows, real):
    "Each variant: means over the seeds, and how far it is from the recipe."
    def values(name, key): return [row[key] for row in rows if row["name"] == name]
    print(f"\n{args.num_samples:,} samples; "
          f"Fréchet distance of as many real images {real['frechet_distance']:.3f}")
    for name in dict.fromkeys(row["name"] for row in rows):
        line = f"{name:40}"
        for key in ("class_agreement", "frechet_distance"):
            found, recipe = values(name, key), values(RECIPE, key)
            line += f" {key} {sum(found)/len(found):.3f}"
            if len(found) == len(recipe) > 1 and name != RECIPE:
                line += " ({:+.3f} ± {:.3f})".format(*paired_difference(found, recipe))
        print(line)

def main():
    args = parse_arguments()
    variants = list(VARIANTS[args.preset].items())
    if args.quick: variants = variants[:2] + [pair for pair in variants if pair[0] == RAW]
    paths = [args.output_dir/OUTPUTS[args.preset]]
    if args.docs: paths.append(Path(__file__).resolve().parent.parent/"nbs"/OUTPUTS[args.preset])
    rows = []
    for seed in range(args.seeds):
        for i, (name, options) in enumerate(variants):
            if seed and args.preset == "tiny" and name not in REPEATED: continue
            row, real = measure(i, name, options, seed, args)
            rows.append(row)
            table = dict(epochs=args.epochs, num_samples=args.num_samples, real=real, rows=rows)
            for path in paths: path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print_table(args, rows, real)

if __name__ == "__main__": main()
