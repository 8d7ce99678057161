"""How good are the samples of the trained `small`, by method and number of steps, for several seeds? This is
the figure of lessons 08, 25 and 27.

usage: python tools/sampling_quality.py [--seeds 3] [--steps N] [--num_samples 1000] [--data_root DIR]
                                        [--output FILE] [--docs] [--quick]

Takes about two hours on two cores. Each result is written at once. If the script is stopped, call it again
and it continues where it ended. --steps measures only this number of steps. Seeds differ in the noise of the
samples and in the choice of the real images beside them. --docs writes nbs/sampling_quality.json. --quick
draws a few images with few steps and compares them with the bundled data: it shows that the script works, but
its figures mean nothing.
"""
import json
import time
from dataclasses import replace
from itertools import product

import torch

from ddpm_tutorial.data import CLASSES
from ddpm_tutorial.fast_sampling import dpm_solver_steps
from ddpm_tutorial.metrics import compute_metrics, extract_features, load_classifier, matched_subset
from ddpm_tutorial.run.checkpoint import load_pretrained
from ddpm_tutorial.run.device import choose_precision
from ddpm_tutorial.scheduler import NoiseScheduler
from ddpm_tutorial.solvers import METHODS
from measuring import EVERYWHERE, draw, in_short, load_result, parse_arguments, real_images

# after the method stands the spacing of its times, if it is not "time", or eta, if it is not 0
STEPS = {"dpm++": (15, 5, 10, 20, 30), "ddim": (30, 5, 10, 20, 50),
         "ddpm": (500, 10, 20, 50, 100),    # the slowest first: are so many steps needed?
         "dpm++ log_snr": (15, 10, 20, 30), "dpm++ whole stride": (15,),
         "dpm++ karras": (10,), "ddim log_snr": (10,), "ddim karras": (10,), "ddim trailing": (10, 5),
         "heun": (10, 5), "dpm++ eta 0.7": (30, 10), "dpm++ eta 1": (30,)}

class WholeStride(NoiseScheduler):
    "The last stride, to clean data, is as long as the strides before it."
    def timesteps(self, n, **options):
        *pairs, (t, _), _ = super().timesteps(n + 1)
        return [*pairs, (t, -1)]

def whole_stride_steps(model, scheduler, *args, **kwargs):
    whole = WholeStride(scheduler.signal, scheduler.sigma, prediction_type=scheduler.prediction_type)
    return dpm_solver_steps(model, whole, *args, **kwargs)

METHODS["dpm++ whole stride"] = whole_stride_steps # measured here only: the commands do not know it

def sampling_settings(sampling, method, steps):
    "The settings of sampling for one of the names above."
    name, *more = method.split()
    if method in METHODS: name, more = method, [] # also "dpm++ whole stride"
    found = {"eta": float(more[1])} if more[:1] == ["eta"] else {"spacing": more[0]} if more else {}
    return replace(sampling, method=name, num_inference_steps=steps, **found)

def summary(rows, method, steps, name="frechet_distance"):
    "Mean over the seeds, and its standard error."
    found = [row[name] for row in rows if (row["method"], row["steps"]) == (method, steps)]
    found = torch.tensor(found, dtype=torch.float64)
    return found.mean().item(), (found.std()/len(found)**0.5).item()

def methods_and_steps(quick):
    "Every method with its numbers of steps, the first of each method before the others."
    pairs = [(method, 3 if quick else steps[place])
             for place in range(5) for method, steps in STEPS.items() if place < len(steps)]
    return list(dict.fromkeys(pairs))

def print_summary(result, pairs, seeds):
    print(f"\n{result['num_samples']:,} images, guidance {result['guidance_scale']:g}; "
          f"mean over {seeds} seeds ± standard error")
    for method, steps in [("real", 0), *sorted(pairs)]:
        mean, error = summary(result["rows"], method, steps)
        print(f"{method:18}{steps:5} steps: Fréchet distance {mean:.4f} ± {error:.4f}")

def main():
    args = parse_arguments(__doc__, "sampling_quality.json", 40,
                           lambda parser: parser.add_argument("--steps", type=int, default=None))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    reference, fresh = real_images(args)
    (model, config), classifier = load_pretrained("small"), load_classifier()
    config = replace(config, sampling=EVERYWHERE)
    labels = torch.arange(args.num_samples) % len(CLASSES)
    seen = extract_features(reference.images, classifier)
    precision = choose_precision("auto", torch.device("cpu"))
    settings = dict(model="small", guidance_scale=config.sampling.guidance_scale,
                    clip_sample=config.sampling.clip_sample, num_samples=args.num_samples,
                    num_reference=len(reference), precision=precision)
    result, pairs = load_result(args.output, settings), methods_and_steps(args.quick)
    if args.steps: pairs = [pair for pair in pairs if pair[1] == args.steps]

    for (method, steps), seed in product([("real", 0), *pairs], range(args.seeds)):
        measured = [(row["method"], row["steps"], row["seed"]) for row in result["rows"]]
        if (method, steps, seed) in measured: continue
        start = time.perf_counter()
        if method == "real": images = matched_subset(fresh, labels, seed)
        else:
            sampling = sampling_settings(config.sampling, method, steps)
            images = draw(model, replace(config, sampling=sampling), labels, seed, precision)
        seconds = time.perf_counter() - start
        row = dict(method=method, steps=steps, seed=seed, seconds=seconds,
                   **compute_metrics(images, reference, seen, classifier))
        result["rows"].append(row)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{method:18}{steps:5} steps, seed {seed}: {in_short(row)}, {row['seconds']:.0f} s", flush=True)
    print_summary(result, pairs, args.seeds)

if __name__ == "__main__": main()
