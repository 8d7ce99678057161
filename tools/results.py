"""What guidance and clipping do to the samples of the trained `small`, for several seeds, and how near they come to training images: for lesson 91.

usage: python tools/results.py [--seeds 3] [--num_samples 1000] [--data_root DIR] [--output FILE] [--docs] [--quick]

Ten minutes on two cores. Each result is written at once, and a second call goes on where the first one ended. All settings share the seeds, so they can be
compared in pairs. --docs writes nbs/results.json; --quick draws a few images with two steps beside the bundled data: it shows that the script works,
its figures mean nothing.
"""
import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from ddpm_tutorial.data import CLASSES, ImageData, load_fashion_mnist, load_sample, to_uint8
from ddpm_tutorial.metrics import matched_subset, compute_metrics, load_classifier, extract_features, nearest_distance
from ddpm_tutorial.run.checkpoint import load_pretrained
from ddpm_tutorial.run.device import choose_precision
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.training import Stream, random_generator

SETTINGS = {"guidance 1.3": {}, "guidance 1": dict(guidance_scale=1.), "guidance 2": dict(guidance_scale=2.), "not clipped": dict(clip_sample=False)}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("outputs/results.json"))
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs into the docs")
    output = Path(__file__).resolve().parent.parent/"nbs"/"results.json" if args.docs else args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.quick: args.num_samples, reference, fresh = 20, load_sample("train"), load_sample("test")
    else: reference, fresh = load_fashion_mnist(args.data_root, "train"), load_fashion_mnist(args.data_root, "test")
    (model, config), classifier, labels = load_pretrained("small"), load_classifier(), torch.arange(args.num_samples) % len(CLASSES)
    if args.quick: config = replace(config, sampling=replace(config.sampling, num_inference_steps=2))
    seen, precision = extract_features(reference.images, classifier), choose_precision("auto", torch.device("cpu"))
    result = json.loads(output.read_text()) if output.exists() else dict(num_samples=args.num_samples, num_reference=len(reference), rows=[], nearest={})

    def write(): output.write_text(json.dumps(result) + "\n", encoding="utf-8")

    def near(name, images): # sorted, in grey levels
        result["nearest"][name] = [round(distance, 1) for distance in nearest_distance(images, reference.images).sort().values.tolist()]

    for seed, what in product(range(args.seeds), ["real images", *SETTINGS]):
        if any((row["what"], row["seed"]) == (what, seed) for row in result["rows"]): continue
        if what == "real images": images = matched_subset(fresh, labels, seed)
        else:
            settings = replace(config, sampling=replace(config.sampling, **SETTINGS[what]))
            drawn = draw_samples(model, settings, labels, generator=random_generator(seed, Stream.SAMPLES), precision=precision)
            images = ImageData(to_uint8(drawn), labels, CLASSES)
        if seed == 0 and what in ("real images", "guidance 1.3"): near(what, images.images)
        row = dict(what=what, seed=seed, **compute_metrics(images, reference, seen, classifier))
        result["rows"].append(row)
        write()
        print(f"{what:14} seed {seed}: Fréchet distance {row['frechet_distance']:.4f}, class agreement {row['class_agreement']:.3f}, coverage {row['coverage']:.3f}", flush=True)
    copies = matched_subset(reference, labels).images     # training images: what does the nearest distance say of copies that were moved or mirrored?
    for name, moved in {"copies": copies, "copies, one pixel to the right": copies.roll(1, -1), "copies, mirrored": copies.flip(-1)}.items(): near(name, moved)
    write()

if __name__ == "__main__": main()
