"""What do the ways of guiding `small` give? Class agreement, Fréchet distance and coverage over the scale.

usage: python tools/guidance.py [--seeds 3] [--num_samples 1000] [--early CHECKPOINT] [--data_root DIR]
                                [--output FILE.json] [--docs] [--quick]

--early is a checkpoint of `small` after one of its epochs, for guidance by a weaker version of itself;
without it, the script trains one (three minutes). It takes twenty minutes on two cores. A result
that exists is not measured again. --docs writes nbs/guidance.json. --quick draws few samples in few steps on
the bundled images: it shows that the script works, but its figures mean nothing.
"""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ddpm_tutorial.data import CLASSES
from ddpm_tutorial.guidance import guided_by_weaker, scale_in_interval
from ddpm_tutorial.metrics import compute_metrics, extract_features, load_classifier, matched_subset
from ddpm_tutorial.run.checkpoint import load_model, load_pretrained
from ddpm_tutorial.run.device import choose_precision
from ddpm_tutorial.sampler import guided
from measuring import EVERYWHERE, draw, in_short, load_result, parse_arguments, real_images

CASES = {"everywhere": (1., 1.3, 1.6, 2., 3., 5.), "levels 0.3 to 3": (1.6, 2., 3.),
         "levels 0.3 to 2": (1.6, 2.2, 3.), "levels 0.3 to 10": (1.6, 2., 3.),
         "away from an early checkpoint": (1.5, 2., 3.), "rescaled": (3.,)}
REPEATED = {("everywhere", 1.3), ("levels 0.3 to 3", 2.), ("levels 0.3 to 2", 2.2)} # for all seeds
RESCALE = 0.7

def rescaled(model, guided_model):
    "2305.08891, section 3.4: the guided prediction gets (most of) the spread of the conditional one."
    def rescaled_model(x, t, **cond):
        prediction, conditional = guided_model(x, t, **cond), model(x, t, **cond)
        spread, wanted = (y.std(dim=(1, 2, 3), keepdim=True) for y in (prediction, conditional))
        return RESCALE*prediction*wanted/spread + (1 - RESCALE)*prediction
    return rescaled_model

def early_checkpoint(args):
    if args.early: return args.early
    folder = Path("outputs")/("small_quick" if args.quick else "small_early")
    path = folder/"checkpoints"/"best_model.pth"
    if not path.exists():
        options = "--data sample --max_steps 2" if args.quick else "--epochs 1"
        if args.data_root: options += f" --data_root {args.data_root.absolute()}"
        command = f"-m ddpm_tutorial.run.train --config small --no-wandb --output_dir {folder} {options}"
        subprocess.run([sys.executable, *command.split()], check=True)
    return path

def guide(way, scale, model, early, scheduler):
    "The model as it is guided in this case."
    null = model.null_cond
    if way == "everywhere": return guided(model, scale, null)
    if way == "rescaled": return rescaled(model, guided(model, scale, null))
    if way.startswith("levels"):
        low, high = way.split()[1::2]
        return guided(model, scale_in_interval(scheduler, scale, (float(low), float(high))), null)
    return guided_by_weaker(model, early, scale)

class Guided(torch.nn.Module):
    "A guided model as `draw` takes it: with weights, and with nothing left to guide."
    null_cond = {}

    def __init__(self, model, guided_model):
        super().__init__()
        self.model, self.guided_model = model, guided_model

    def forward(self, x, t, **cond): return self.guided_model(x, t, **cond)

def main():
    args = parse_arguments(__doc__, "guidance.json", 40,
                           lambda parser: parser.add_argument("--early", type=Path))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    reference, fresh = real_images(args)
    classifier = load_classifier()
    seen = extract_features(reference.images, classifier)
    model, config = load_pretrained("small")
    config = replace(config, sampling=replace(EVERYWHERE, num_inference_steps=2 if args.quick else None))
    early, _ = load_model(early_checkpoint(args))
    labels = torch.arange(args.num_samples) % len(CLASSES)
    precision, scheduler = choose_precision("auto", torch.device("cpu")), config.scheduler.build()
    result = load_result(args.output, dict(num_samples=args.num_samples, method=config.sampling.method,
                                           steps=config.inference_steps, precision=precision))
    result["real"] = compute_metrics(matched_subset(fresh, labels), reference, seen, classifier)
    known = {(row["way"], row["scale"], row["seed"]) for row in result["rows"]}
    for seed in range(args.seeds):
        for way, scale in ((way, scale) for way, scales in CASES.items() for scale in scales):
            if (way, scale, seed) in known or seed and (way, scale) not in REPEATED: continue
            guided_model = Guided(model, guide(way, scale, model, early, scheduler))
            images = draw(guided_model, config, labels, seed, precision)
            metrics = compute_metrics(images, reference, seen, classifier)
            result["rows"].append(dict(way=way, scale=scale, seed=seed, **metrics))
            print(f"seed {seed}, {way}, scale {scale:g}: {in_short(metrics)}", flush=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
