"""What do guidance and clipping do to the samples of the trained `small`, for several seeds, and how near do
the samples come to training images? For lesson 91.

usage: python tools/results.py [--seeds 3] [--num_samples 1000] [--data_root DIR] [--output FILE]
                               [--docs] [--quick]

Takes ten minutes on two cores. Each result is written at once. If the script is stopped, call it again and it
continues where it ended. All settings share the seeds, so they can be compared in pairs. --docs writes
nbs/results.json. --quick draws a few images in two steps and compares them with the bundled data: it shows
that the script works, but its figures mean nothing.
"""
import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from ddpm_tutorial.data import CLASSES, ImageData, load_fashion_mnist, load_sample
from ddpm_tutorial.metrics import (matched_subset, compute_metrics, load_classifier, extract_features,
                                   nearest_distance)
from ddpm_tutorial.run.checkpoint import load_pretrained
from ddpm_tutorial.run.device import choose_precision
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.training import Stream, random_generator

SETTINGS = {"guidance 1.3": {}, "guidance 1": dict(guidance_scale=1.), "guidance 2": dict(guidance_scale=2.),
            "not clipped": dict(clip_sample=False)}

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("outputs/results.json"))
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs in the docs")
    if args.docs: args.output = Path(__file__).resolve().parent.parent/"nbs"/"results.json"
    if args.quick: args.num_samples = 20
    return args

def load_images(args):
    "Training images, and test images."
    if args.quick: return load_sample("train"), load_sample("test")
    return load_fashion_mnist(args.data_root, "train"), load_fashion_mnist(args.data_root, "test")

def draw(model, config, labels, seed, precision):
    "Samples as images in uint8."
    generator = random_generator(seed, Stream.SAMPLES)
    drawn = draw_samples(model, config, labels, generator=generator, precision=precision)
    return ImageData(drawn, labels, CLASSES)

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
    args = parse_arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    reference, fresh = load_images(args)
    (model, config), classifier = load_pretrained("small"), load_classifier()
    if args.quick: config = replace(config, sampling=replace(config.sampling, num_inference_steps=2))
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
            settings = replace(config, sampling=replace(config.sampling, **SETTINGS[what]))
            images = draw(model, settings, labels, seed, precision)
        if seed == 0 and what in ("real images", "guidance 1.3"):
            result["nearest"][what] = distances(images.images, reference)
        row = dict(what=what, seed=seed, **compute_metrics(images, reference, seen, classifier))
        result["rows"].append(row)
        write()
        print(f"{what:14} seed {seed}: Fréchet distance {row['frechet_distance']:.4f}, "
              f"class agreement {row['class_agreement']:.3f}, coverage {row['coverage']:.3f}", flush=True)
    result["nearest"] |= distances_of_copies(reference, labels)
    write()

if __name__ == "__main__": main()
