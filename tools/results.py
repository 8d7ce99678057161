"""What do the settings of sampling do to the samples of the trained `small`, for several seeds, and how near
do the samples come to training images? For lesson 91.

usage: python tools/results.py [--seeds 3] [--num_samples 1000] [--data_root DIR] [--output FILE]
                               [--docs] [--quick]

Takes twelve minutes on two cores. Each result is written at once. If the script is stopped, call it again and
it continues where it ended. All settings share the seeds, so they can be compared in pairs. --docs writes
nbs/results.json. --quick draws a few images in two steps and compares them with the bundled data: it shows
that the script works, but its figures mean nothing.
"""
import json
from dataclasses import asdict, replace
from itertools import product

import torch

from ddpm_tutorial.data import CLASSES
from ddpm_tutorial.metrics import (matched_subset, compute_metrics, load_classifier, extract_features,
                                   nearest_distance)
from ddpm_tutorial.run.checkpoint import load_pretrained
from ddpm_tutorial.run.config import PRESETS
from ddpm_tutorial.run.device import choose_precision
from measuring import EVERYWHERE, draw, in_short, parse_arguments, real_images

SETTINGS = {"guidance 1.3": {}, "guidance 1": dict(guidance_scale=1.), "guidance 2": dict(guidance_scale=2.),
            "not clipped": dict(clip_sample=False), "as it comes": asdict(PRESETS["small"].sampling)}

def distances(images, reference):
    "How far each image is from the nearest training image, sorted, in grey levels."
    found = nearest_distance(images, reference.images).sort().values.tolist()
    return [round(distance, 1) for distance in found]

def distances_of_copies(reference, labels):
    "What does the nearest distance say of training images that were moved or mirrored?"
    copies = matched_subset(reference, labels).images
    changed = {"copies": copies, "copies, one pixel to the right": copies.roll(1, -1),
               "copies, mirrored": copies.flip(-1)}
    return {name: distances(images, reference) for name, images in changed.items()}

def main():
    args = parse_arguments(__doc__, "results.json", quick_samples=20)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    reference, fresh = real_images(args)
    (model, config), classifier = load_pretrained("small"), load_classifier()
    labels = torch.arange(args.num_samples) % len(CLASSES)
    seen = extract_features(reference.images, classifier)
    precision = choose_precision("auto", torch.device("cpu"))
    result = dict(num_samples=args.num_samples, num_reference=len(reference), rows=[], nearest={})
    if args.output.exists(): result = json.loads(args.output.read_text())

    def write(): args.output.write_text(json.dumps(result) + "\n", encoding="utf-8")

    for seed, what in product(range(args.seeds), ["real images", *SETTINGS]):
        if any((row["what"], row["seed"]) == (what, seed) for row in result["rows"]): continue
        if what == "real images": images = matched_subset(fresh, labels, seed)
        else:
            changes = SETTINGS[what] | (dict(num_inference_steps=2) if args.quick else {})
            settings = replace(config, sampling=replace(EVERYWHERE, **changes))
            images = draw(model, settings, labels, seed, precision)
        if seed == 0 and what in ("real images", "guidance 1.3"):
            result["nearest"][what] = distances(images.images, reference)
        row = dict(what=what, seed=seed, **compute_metrics(images, reference, seen, classifier))
        result["rows"].append(row)
        write()
        print(f"{what:14} seed {seed}: {in_short(row)}", flush=True)
    result["nearest"] |= distances_of_copies(reference, labels)
    write()

if __name__ == "__main__": main()
