"""What lesson 23 shows and cannot compute in two minutes: samples of `emoji64`, and the cost of attention and
of patches.

usage: python tools/resolution.py [--checkpoint FILE] [--output FILE.json] [--docs] [--quick]

--checkpoint is one of `emoji64`; without it, the script trains the preset (half an hour on two cores). The
samples go into a file beside the figures, which ends in .npz. --docs writes nbs/emoji.json and nbs/emoji.npz.
--quick trains for two steps and draws in two: it shows that the script works, but its figures mean nothing.
"""
import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ddpm_tutorial.attention import AttentionBlock
from ddpm_tutorial.emoji import GROUPS
from ddpm_tutorial.run.checkpoint import load_checkpoint, load_model
from ddpm_tutorial.run.config import PRESETS, fit_to_data
from ddpm_tutorial.run.device import choose_precision, label_conditions, new_model, saved_bytes
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.training import Stream, find_gradient, new_state, optimizer_step, random_generator

EACH = 10 # samples of a group

def parse_arguments():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path("outputs")/"emoji.json")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs in the docs")
    if args.docs: args.output = Path(__file__).resolve().parent.parent/"nbs"/"emoji.json"
    return args

def trained(args):
    "The path of a checkpoint of `emoji64`, trained if there is none."
    if args.checkpoint: return args.checkpoint
    folder = Path("outputs")/("emoji64_quick" if args.quick else "v1_emoji64")
    path = folder/"checkpoints"/"best_model.pth"
    if not path.exists():
        options = "--max_steps 2 --batch_size 4 --num_inference_steps 2" if args.quick else ""
        command = f"-m ddpm_tutorial.run.train --config emoji64 --no-wandb --output_dir {folder} {options}"
        subprocess.run([sys.executable, *command.split()], check=True)
    return path

def seconds(function, repeat):
    "The shortest of several times. The first call only warms up."
    took = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        took.append(time.perf_counter() - start)
    return min(took[1:])

def attention_cost(kind, size, repeat):
    "Of one head for one image: a block without its feed-forward, and what its forward pass keeps."
    block = AttentionBlock(32, head_dim=32, num_groups=2, kind=kind, feed_forward=False)
    x = torch.zeros(1, 32, size, size)
    with torch.no_grad(): took = seconds(lambda: block(x), repeat)
    return dict(kind=kind, size=size, milliseconds=1000*took, mib=saved_bytes(block, lambda: block(x))/2**20)

def patch_cost(patch_size, repeat, batch_size):
    "One training step of `emoji64` on patches of this size."
    config = fit_to_data(PRESETS["emoji64"], (3, 64, 64), GROUPS)
    model = replace(config.model, patch_size=patch_size, attention_resolutions=(16,))
    config = replace(config, model=model, train=replace(config.train, batch_size=batch_size))
    state = new_state(new_model(config), config.train)
    precision = choose_precision("auto", torch.device("cpu"))
    objective = config.build_objective()
    x0, cond = torch.zeros(batch_size, 3, 64, 64), {"labels": torch.arange(batch_size) % len(GROUPS)}
    def step():
        losses, _ = find_gradient(state, objective, x0, cond, config.train, 1e-4, precision)
        optimizer_step(state, losses.mean(), 1e-4, 1.)
    rate = batch_size/seconds(step, repeat)
    kept = saved_bytes(state.model, lambda: state.model(x0[:1], torch.zeros(1, dtype=torch.long)))
    return dict(patch_size=patch_size, images_per_second=rate, mib=kept/2**20, precision=precision)

def main():
    args = parse_arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    path = trained(args)
    model, config = load_model(path)
    if args.quick: config = replace(config, sampling=replace(config.sampling, num_inference_steps=2))
    labels = torch.arange(len(GROUPS)).repeat_interleave(2 if args.quick else EACH)
    precision = choose_precision("auto", torch.device("cpu"))
    samples = draw_samples(model, config, len(labels), label_conditions(config, labels),
                           generator=random_generator(0, Stream.SAMPLES), precision=precision)
    np.savez_compressed(args.output.with_suffix(".npz"), images=samples.numpy(), labels=labels.numpy())
    checkpoint, repeat = load_checkpoint(path), 1 if args.quick else 3
    sizes = (8, 16) if args.quick else (16, 32, 64, 128)
    cases = [(kind, size) for kind in ("self", "linear") for size in sizes]
    result = dict(threads=torch.get_num_threads(), torch=torch.__version__,
                  step=checkpoint["step"], batch_size=config.train.batch_size,
                  minutes=checkpoint["progress"]["seconds"]/60, guidance_scale=config.sampling.guidance_scale,
                  attention=[attention_cost(kind, size, repeat) for kind, size in cases],
                  patches=[patch_cost(n, repeat, 2 if args.quick else 16) for n in (1, 2, 4)])
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["attention"] + result["patches"]: print(row)

if __name__ == "__main__": main()
