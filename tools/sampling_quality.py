"""How good are the samples of the trained `small`, by method and number of steps, for several seeds? This is
the figure of lesson 08.

usage: python tools/sampling_quality.py [--seeds 3] [--num_samples 1000] [--data_root DIR] [--output FILE]
                                        [--docs] [--quick]

Takes about two hours on two cores. Each result is written at once. If the script is stopped, call it again
and it continues where it ended. Seeds differ in the noise of the samples and in the choice of the real images
beside them. --docs writes nbs/sampling_quality.json. --quick draws a few images with few steps and compares
them with the bundled data: it shows that the script works, but its figures mean nothing.
"""
import argparse
import json
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from ddpm_tutorial.data import CLASSES, ImageData, load_fashion_mnist, load_sample
from ddpm_tutorial.fast_sampling import METHODS, dpm_solver_steps
from ddpm_tutorial.metrics import compute_metrics, extract_features, load_classifier, matched_subset
from ddpm_tutorial.run.checkpoint import load_pretrained
from ddpm_tutorial.run.device import choose_precision
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.scheduler import NoiseScheduler
from ddpm_tutorial.training import Stream, random_generator

STEPS = {"dpm++": (15, 5, 10, 20, 30), "ddim": (30, 5, 10, 20, 50),
         "ddpm": (500, 10, 20, 50, 100),    # the slowest first: are so many steps needed?
         "dpm++ log_snr": (15, 10, 20, 30), "dpm++ whole stride": (15,)}

class WholeStride(NoiseScheduler):
    "The last stride, to clean data, is as long as the strides before it."
    def timesteps(self, n, **kwargs):
        *pairs, (t, _), _ = super().timesteps(n + 1)
        return [*pairs, (t, -1)]

def whole_stride_steps(model, scheduler, *args, **kwargs):
    whole = WholeStride(scheduler.signal, scheduler.sigma, prediction_type=scheduler.prediction_type)
    return dpm_solver_steps(model, whole, *args, **kwargs)

# these two are measured here only, and the commands do not know them
METHODS["dpm++ log_snr"] = partial(dpm_solver_steps, spacing="log_snr")
METHODS["dpm++ whole stride"] = whole_stride_steps

def summary(rows, method, steps, name="frechet_distance"):
    "Mean over the seeds, and its standard error."
    found = [row[name] for row in rows if (row["method"], row["steps"]) == (method, steps)]
    found = torch.tensor(found, dtype=torch.float64)
    return found.mean().item(), (found.std()/len(found)**0.5).item()

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("outputs/sampling_quality.json"))
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs in the docs")
    if args.docs: args.output = Path(__file__).resolve().parent.parent/"nbs"/"sampling_quality.json"
    if args.quick: args.num_samples = 40
    return args

def load_images(args):
    "Training images, and test images."
    if args.quick: return load_sample("train"), load_sample("test")
    return load_fashion_mnist(args.data_root, "train"), load_fashion_mnist(args.data_root, "test")

def load_result(output, settings):
    "What an earlier call has measured with the same settings."
    result = json.loads(output.read_text()) if output.exists() else {**settings, "rows": []}
    if {name: result[name] for name in settings} != settings:
        raise SystemExit(f"{output} was measured with other settings: move it away")
    return result

def methods_and_steps(quick):
    "Every method with its numbers of steps, the first of each method before the others."
    pairs = [(method, 3 if quick else steps[place])
             for place in range(5) for method, steps in STEPS.items() if place < len(steps)]
    return list(dict.fromkeys(pairs))

def draw(model, config, labels, seed, precision):
    "Samples as images in uint8."
    generator = random_generator(seed, Stream.SAMPLES)
    drawn = draw_samples(model, config, labels, generator=generator, precision=precision)
    return ImageData(drawn, labels, CLASSES)

def print_summary(result, pairs, seeds):
    print(f"\n{result['num_samples']:,} images, guidance {result['guidance_scale']:g}; "
          f"mean over {seeds} seeds ± standard error")
    for method, steps in [("real", 0), *sorted(pairs)]:
        mean, error = summary(result["rows"], method, steps)
        print(f"{method:18}{steps:5} steps: Fréchet distance {mean:.4f} ± {error:.4f}")

def main():
    args = parse_arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    reference, fresh = load_images(args)
    (model, config), classifier = load_pretrained("small"), load_classifier()
    labels = torch.arange(args.num_samples) % len(CLASSES)
    seen = extract_features(reference.images, classifier)
    precision = choose_precision("auto", torch.device("cpu"))
    settings = dict(model="small", guidance_scale=config.sampling.guidance_scale,
                    clip_sample=config.sampling.clip_sample, num_samples=args.num_samples,
                    num_reference=len(reference), precision=precision)
    result, pairs = load_result(args.output, settings), methods_and_steps(args.quick)

    for (method, steps), seed in product([("real", 0), *pairs], range(args.seeds)):
        measured = [(row["method"], row["steps"], row["seed"]) for row in result["rows"]]
        if (method, steps, seed) in measured: continue
        start = time.perf_counter()
        if method == "real": images = matched_subset(fresh, labels, seed)
        else:
            sampling = replace(config.sampling, method=method, num_inference_steps=steps)
            images = draw(model, replace(config, sampling=sampling), labels, seed, precision)
        seconds = time.perf_counter() - start
        row = dict(method=method, steps=steps, seed=seed, seconds=seconds,
                   **compute_metrics(images, reference, seen, classifier))
        result["rows"].append(row)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{method:18}{steps:5} steps, seed {seed}: Fréchet distance {row['frechet_distance']:.4f}, "
              f"class agreement {row['class_agreement']:.3f}, coverage {row['coverage']:.3f}, "
              f"{row['seconds']:.0f} s", flush=True)
    print_summary(result, pairs, args.seeds)

if __name__ == "__main__": main()
