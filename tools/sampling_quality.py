"""How good the samples of the trained `small` are, by method and number of steps, for several seeds: the figure of lesson 08.

usage: python tools/sampling_quality.py [--seeds 3] [--num_samples 1000] [--data_root DIR] [--output FILE] [--docs] [--quick]

About two hours on two cores. Each result is written at once, and a second call goes on where the first one ended. Seeds differ in the noise
of the samples and in the choice of the real images beside them. --docs writes nbs/sampling_quality.json; --quick draws a few
images with few steps of the bundled data: it shows that the script works, its figures mean nothing.
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
from ddpm_tutorial.metrics import matched_subset, compute_metrics, load_classifier, extract_features
from ddpm_tutorial.run.checkpoint import load_pretrained
from ddpm_tutorial.run.device import choose_precision
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.scheduler import NoiseScheduler
from ddpm_tutorial.training import Stream, random_generator

STEPS = {"dpm++": (15, 5, 10, 20, 30), "ddim": (30, 5, 10, 20, 50), "ddpm": (500, 10, 20, 50, 100),    # is the slowest one needed? The answer comes first
         "dpm++ log_snr": (15, 10, 20, 30), "dpm++ whole stride": (15,)}

class WholeStride(NoiseScheduler):
    "The last leap, to clean data, is as long as the strides before it."
    def timesteps(self, n, **kwargs):
        *pairs, (t, _), _ = super().timesteps(n + 1)
        return [*pairs, (t, -1)]

def whole_stride_steps(model, scheduler, *args, **kwargs):
    whole = WholeStride(scheduler.signal, scheduler.sigma, prediction_type=scheduler.prediction_type)
    return dpm_solver_steps(model, whole, *args, **kwargs)

METHODS["dpm++ log_snr"] = partial(dpm_solver_steps, spacing="log_snr")    # these two are measured here only: the commands do not know them
METHODS["dpm++ whole stride"] = whole_stride_steps

def summary(rows, method, steps, name="frechet_distance"):
    "Mean over the seeds, and its standard error."
    found = torch.tensor([row[name] for row in rows if (row["method"], row["steps"]) == (method, steps)], dtype=torch.float64)
    return found.mean().item(), (found.std()/len(found)**0.5).item()

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("outputs/sampling_quality.json"))
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs into the docs")
    output = Path(__file__).resolve().parent.parent/"nbs"/"sampling_quality.json" if args.docs else args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.quick: args.num_samples, reference, fresh = 40, load_sample("train"), load_sample("test")
    else: reference, fresh = load_fashion_mnist(args.data_root, "train"), load_fashion_mnist(args.data_root, "test")
    (model, config), classifier, labels = load_pretrained("small"), load_classifier(), torch.arange(args.num_samples) % len(CLASSES)
    seen, precision = extract_features(reference.images, classifier), choose_precision("auto", torch.device("cpu"))
    settings = dict(model="small", guidance_scale=config.sampling.guidance_scale, clip_sample=config.sampling.clip_sample, num_samples=args.num_samples, num_reference=len(reference), precision=precision)
    result = json.loads(output.read_text()) if output.exists() else {**settings, "rows": []}
    if {name: result[name] for name in settings} != settings: raise SystemExit(f"{output} was measured with other settings; move it away")

    todo = [(method, 3 if args.quick else steps[place]) for place in range(5) for method, steps in STEPS.items() if place < len(steps)]
    for (method, steps), seed in product([("real", 0), *dict.fromkeys(todo)], range(args.seeds)):
        if any((row["method"], row["steps"], row["seed"]) == (method, steps, seed) for row in result["rows"]): continue
        start = time.perf_counter()
        if method == "real": images = matched_subset(fresh, labels, seed)
        else:
            sampling = replace(config.sampling, method=method, num_inference_steps=steps)
            drawn = draw_samples(model, replace(config, sampling=sampling), labels, generator=random_generator(seed, Stream.SAMPLES), precision=precision)
            images = ImageData(drawn, labels, CLASSES)
        row = dict(method=method, steps=steps, seed=seed, seconds=time.perf_counter() - start, **compute_metrics(images, reference, seen, classifier))
        result["rows"].append(row)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{method:18}{steps:5} steps, seed {seed}: Fréchet distance {row['frechet_distance']:.4f}, class agreement {row['class_agreement']:.3f}, coverage {row['coverage']:.3f}, {row['seconds']:.0f} s", flush=True)
    print(f"\n{args.num_samples:,} images, guidance {config.sampling.guidance_scale:g}; mean over {args.seeds} seeds ± standard error")
    for method, steps in [("real", 0), *sorted(dict.fromkeys(todo))]:
        mean, error = summary(result["rows"], method, steps)
        print(f"{method:18}{steps:5} steps: Fréchet distance {mean:.4f} ± {error:.4f}")

if __name__ == "__main__": main()
