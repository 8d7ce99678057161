"""When does a network copy, and when does it make something new? Trains `tiny` on few and on many images,
twice on images that have none in common, and compares what both draw from the same noise.

usage: python tools/generalisation.py [--data_root DIR] [--output_dir DIR] [--only NAME ...]
                                      [--docs] [--quick]

Takes about three quarters of an hour on two cores. Each training is kept in its folder, and a result that
exists is not measured again. --only takes some of the trainings, so that two calls can share the work (one
thread each). --docs writes nbs/generalisation.json and nbs/generalisation.npz. --quick trains for a few steps
on the bundled images: it shows that the script works, but its figures mean nothing.
"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ddpm_tutorial.data import CLASSES, load_fashion_mnist, load_sample
from ddpm_tutorial.metrics import nearest_distance
from ddpm_tutorial.run.config import PRESETS
from ddpm_tutorial.run.device import choose_precision, label_conditions, new_model
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.training import new_state, random_generator, train_steps
from measuring import parse_folder_arguments

# name: number of training images, which half, width of the network
TRAININGS = {"10 a": (10, 0, 64), "100 a": (100, 0, 64), "100 b": (100, 1, 64), "1000 a": (1000, 0, 64),
             "1000 b": (1000, 1, 64), "10000 a": (10_000, 0, 64), "10000 b": (10_000, 1, 64),
             "30000 a": (30_000, 0, 64), "30000 b": (30_000, 1, 64), "1000 narrow": (1000, 0, 16),
             "100 narrow": (100, 0, 16)}
LOOKS = (150, 500, 1500)   # after so many steps, the samples are compared with the training images

def images_for(name, data):
    "The training images, and as many others that the network has not seen."
    count, half, _ = TRAININGS[name]
    order = torch.randperm(len(data), generator=random_generator(0))
    mine, other = (order[k*len(data)//2:][:count] for k in (half, 1 - half))
    return data[mine], data[other]

def share_closer(samples, own, other):
    """The share of the samples that are closer to the nearest training image than to the nearest of as many
    other images, and the median distance from the training images. Half is what no copying would give."""
    own_distance, other_distance = (nearest_distance(samples, part.images) for part in (own, other))
    return (own_distance < other_distance).double().mean().item(), own_distance.median().item()

def train_and_look(name, data, num_samples, steps):
    "Trains on the images of this name and looks at samples on the way. Returns a row, and the last samples."
    own, other = images_for(name, data)
    preset, width = PRESETS["tiny"], TRAININGS[name][2]
    groups = min(preset.model.num_groups, width)
    model = replace(preset.model, base_channels=width, num_groups=groups, head_dim=min(32, width))
    train = replace(preset.train, batch_size=min(64, len(own)), epochs=10**6, max_steps=steps[-1])
    config = replace(preset, model=model, train=train, sampling=replace(preset.sampling, guidance_scale=1.))
    state, precision = new_state(new_model(config), train), choose_precision("auto", torch.device("cpu"))
    labels, looks = torch.arange(num_samples) % len(CLASSES), []
    for step in train_steps(state, own, config.build_objective(), train, precision):
        if step.step not in steps: continue
        samples = draw_samples(state.ema, config, len(labels), label_conditions(config, labels),
                               generator=random_generator(1), precision=precision)
        closer, distance = share_closer(samples, own, other)
        looks.append(dict(step=step.step, loss=step.loss, closer=closer, nearest_training_image=distance))
        print(name, looks[-1], flush=True)
    return dict(name=name, images=len(own), width=width, looks=looks), samples

def add_options(parser):
    parser.add_argument("--only", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))

def collect(folder):
    "All rows that are there, in the order of TRAININGS, how alike two halves are, and some samples of each."
    names = [name for name in TRAININGS if (folder/f"{name}.json").exists()]
    rows = [json.loads((folder/f"{name}.json").read_text()) for name in names]
    samples = {name: torch.from_numpy(np.load(folder/f"{name}.npy")) for name in names}
    halves = {}
    for name in names:
        count, _, half = name.partition(" ")
        if half != "b" or f"{count} a" not in samples: continue
        one, two = samples[f"{count} a"].double(), samples[name].double()
        apart = (one - two).square().flatten(1).mean(dim=1).sqrt()
        strangers = (one - two.roll(10, dims=0)).square().flatten(1).mean(dim=1).sqrt() # the same class
        halves[count] = dict(same_noise=apart.median().item(), other_noise=strangers.median().item())
    pictures = {name: images[:20].numpy() for name, images in samples.items()}
    return dict(rows=rows, halves=halves), pictures

def main():
    args = parse_folder_arguments(__doc__, "generalisation", add_options)
    data = load_sample("train") if args.quick else load_fashion_mnist(args.data_root, "train")
    steps, num_samples = ((1, 2), 20) if args.quick else (LOOKS, 200)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        path = args.output_dir/f"{name}.json"
        if path.exists(): continue
        row, samples = train_and_look(name, data, num_samples, steps)
        np.save(path.with_suffix(".npy"), samples.numpy())
        path.write_text(json.dumps(row))
    found, pictures = collect(args.output_dir)
    folder = Path(__file__).resolve().parent.parent/"nbs" if args.docs else args.output_dir
    (folder/"generalisation.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(folder/"generalisation.npz", **pictures)
    print(json.dumps(found["halves"], indent=1))

if __name__ == "__main__": main()
