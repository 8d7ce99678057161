"""Distils a trained network into students of fewer and fewer steps, and measures each of them. For lesson 27.

usage: python tools/distill.py [--teacher CHECKPOINT] [--stages 8 4 2 1] [--first_teacher_steps 4]
                               [--train_steps 1000] [--lr 0.0005] [--data_root DIR] [--output_dir DIR]
                               [--docs] [--quick]

The first student learns from the teacher with its own guidance, each other one from the student before it. A
student that exists is not trained again, and one that was measured is not measured again. Every student is
a file of averaged weights that `ddpm_sample --checkpoint` takes. --docs writes nbs/distill.json, and makes
the students of 4 steps and of 1 the networks `small_few` and `small_one` of the package, with cards.
--quick trains for two steps on the bundled images: it shows that the script works, but its figures mean
nothing.
"""
import hashlib
import json
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from ddpm_tutorial.data import CLASSES
from ddpm_tutorial.distillation import distillation_objective
from ddpm_tutorial.metrics import compute_metrics, extract_features, load_classifier, matched_subset
from ddpm_tutorial.run.checkpoint import PRETRAINED, load_model, load_pretrained, save_weights
from ddpm_tutorial.run.config import SamplingConfig
from ddpm_tutorial.run.device import choose_precision, new_model
from ddpm_tutorial.sampler import guided
from ddpm_tutorial.training import new_state, train_steps
from measuring import draw, in_short, load_result, parse_folder_arguments, real_images

SHIPPED = {4: "small_few", 1: "small_one"}
CARD = """# The student `{name}`

A U-Net of {weights:,} weights that draws clothes of 28x28 pixels, class by class, with {calls} of the \
network. Averaged weights in half precision, with the configuration in the file's metadata
(`load_pretrained("{name}")`, or `ddpm_sample --checkpoint {name}`).

- Distilled from `small` on the 60,000 training images of \
[Fashion-MNIST](https://arxiv.org/abs/1708.07747) (MIT licence) by `python tools/distill.py`: {chain}; \
{train_steps:,} steps of {batch_size} images each, learning rate {lr:g}, {precision}.
- Draws with DDIM and trailing times. The guidance of its first teacher ({guidance}) is inside; it has no \
other.
- For learning: what holds for `small` holds for its student.
- `{name}.safetensors` has {size:,} bytes, sha256 {sha}.

## Evaluation

{num_samples:,} samples, {seeds_of}; "real" are as many test images that no model has seen.

| | `small` | `{name}` | real |
|---|---|---|---|
"""

def describe(config):
    "How the teacher draws. Its students learn its guidance."
    how = config.sampling
    at = " at noise levels {:g} to {:g}".format(*how.guidance_interval) if how.guidance_interval else ""
    steps = f"{how.method}, {config.inference_steps} steps, eta {how.eta:g}"
    return f"{steps}, guidance {how.guidance_scale:g}{at}"

def student_config(teacher_config, num_inference_steps, args):
    "The settings of a student: how it is trained, and the one way in which it draws."
    sampling = SamplingConfig(guidance_scale=1., method="ddim", spacing="trailing",
                              num_inference_steps=num_inference_steps)
    train = replace(teacher_config.train, epochs=1000, max_steps=args.train_steps, lr=args.lr, lr_decay=True,
                    warmup_steps=min(100, args.train_steps//10), label_dropout=0., batch_size=args.batch_size)
    return replace(teacher_config, train=train, sampling=sampling, student_steps=num_inference_steps)

def distil(path, teacher, first_weights, config, teacher_steps, data, args):
    "Trains a student, unless its file exists. Returns it, and the seconds that its training took."
    if path.exists(): return load_model(path)[0], None
    objective = distillation_objective(teacher, config.scheduler.build(), config.student_steps, teacher_steps)
    model, start, losses = new_model(config), time.perf_counter(), []
    model.load_state_dict(first_weights)
    state = new_state(model, config.train)
    for step in train_steps(state, data, objective, config.train, args.precision):
        losses.append(step.loss)
        if step.step % 100 == 0:
            print(f"{path.name}: step {step.step:,}, loss {sum(losses)/len(losses):.5f}", flush=True)
            losses.clear()
    save_weights(path, state.ema.state_dict(), config)
    return load_model(path)[0], time.perf_counter() - start

def add_options(parser):
    parser.add_argument("--teacher", type=Path, default=None)
    parser.add_argument("--stages", type=int, nargs="+", default=[8, 4, 2, 1])
    parser.add_argument("--first_teacher_steps", type=int, default=4)
    parser.add_argument("--train_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=1000)

def parse_arguments():
    args = parse_folder_arguments(__doc__, "distill", add_options)
    if args.quick: args.train_steps, args.num_samples, args.seeds = 2, 20, 1
    args.precision = choose_precision("auto", torch.device("cpu"))
    return args

def measure(name, model, config, result, judge, args):
    "Adds what the samples of a network reach, for each seed that is not there yet."
    labels = torch.arange(args.num_samples) % len(CLASSES)
    for seed in range(args.seeds):
        if any((row["name"], row["seed"]) == (name, seed) for row in result["rows"]): continue
        start = time.perf_counter()
        images = draw(model, config, labels, seed, args.precision)
        row = dict(name=name, steps=config.inference_steps, seed=seed, seconds=time.perf_counter() - start,
                   **compute_metrics(images, *judge))
        result["rows"].append(row)
        print(f"{name}, seed {seed}: {in_short(row)}", flush=True)
        write_result(result, args)

def write_result(result, args):
    paths = [args.output_dir/"distill.json"]
    if args.docs: paths.append(Path(__file__).resolve().parent.parent/"nbs"/"distill.json")
    for path in paths: path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

def ship(steps, teacher_config, result, args):
    "Makes a student a network of the package, with its card."
    name, how = SHIPPED[steps], teacher_config.sampling
    stored = PRETRAINED[name]
    shutil.copyfile(args.output_dir/f"{steps}_steps.safetensors", stored)
    first = f"{args.first_teacher_steps*args.stages[0]} guided steps to {args.stages[0]}"
    guidance = f"scale {how.guidance_scale:g}"
    if how.guidance_interval: guidance += ", noise levels {:g} to {:g}".format(*how.guidance_interval)
    card = CARD.format(name=name, weights=sum(p.numel() for p in load_model(stored)[0].parameters()),
                       calls=f"{steps} calls" if steps > 1 else "one call", size=stored.stat().st_size,
                       chain=", ".join([first, *(f"then to {n}" for n in args.stages[1:] if n >= steps)]),
                       sha=hashlib.sha256(stored.read_bytes()).hexdigest(), guidance=guidance,
                       seeds_of=f"mean over {args.seeds} seeds" if args.seeds > 1 else "one seed",
                       **vars(args))
    for key in ("class_agreement", "frechet_distance", "kernel_distance", "density", "coverage"):
        means = [statistics.mean(row[key] for row in result["rows"] if row["name"] == which)
                 for which in ("teacher", f"student of {steps}")]
        cells = [key.replace("_", " "), *(f"{value:.4g}" for value in (*means, result["real"][key]))]
        card += f"| {' | '.join(cells)} |\n"
    stored.with_suffix(".md").write_text(card, encoding="utf-8")
    print(card)

def main():
    args = parse_arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data, fresh = real_images(args)
    teacher, config = load_model(args.teacher) if args.teacher else load_pretrained("small")
    if args.quick: config = replace(config, sampling=replace(config.sampling, num_inference_steps=2))
    classifier = load_classifier()
    judge = data, extract_features(data.images, classifier), classifier
    settings = {name: getattr(args, name) for name in ("stages", "first_teacher_steps", "train_steps",
                                                       "batch_size", "lr", "num_samples", "precision")}
    settings["teacher"] = describe(config)
    result = load_result(args.output_dir/"distill.json", settings)
    labels = torch.arange(args.num_samples) % len(CLASSES)
    result["real"] = compute_metrics(matched_subset(fresh, labels), *judge)
    measure("teacher", teacher, config, result, judge, args)
    weights, scale = teacher, config.sampling.scale(config.scheduler.build())
    model = guided(teacher, scale, teacher.null_cond)
    for before, steps in zip([args.first_teacher_steps*args.stages[0], *args.stages], args.stages):
        student_settings = student_config(config, steps, args)
        model, seconds = distil(args.output_dir/f"{steps}_steps.safetensors", model, weights.state_dict(),
                                student_settings, before//steps, data, args)
        if seconds is not None: result.setdefault("training_seconds", {})[str(steps)] = seconds
        measure(f"student of {steps}", model, student_settings, result, judge, args)
        weights = model
    write_result(result, args)
    for steps in SHIPPED if args.docs else (): ship(steps, config, result, args)

if __name__ == "__main__": main()
