"""How many bits per dimension does `small` need for images that chose nothing? The bound, the value by the
flow, a finer grid of times, a network that learned its variance, and what simple coders need.

usage: python tools/likelihood.py [--num_images 8000] [--num_flow 500] [--data_root DIR] [--output FILE.json]
                                  [--docs] [--quick]

Takes half an hour on two cores. --docs writes nbs/likelihood.json. --quick takes few images of the
bundled ones and few steps: it shows that the script works, but its figures mean nothing.
"""
import io
import json
import lzma
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ddpm_tutorial.data import load_fashion_mnist, load_sample, to_pil
from ddpm_tutorial.likelihood import flow_bits, hybrid_objective, variational_bound
from ddpm_tutorial.run.checkpoint import load_pretrained
from ddpm_tutorial.run.device import choose_precision, new_model
from ddpm_tutorial.scheduler import NoiseScheduler
from ddpm_tutorial.training import TrainConfig, new_state, random_generator, train_steps
from measuring import parse_common

def mean_and_error(values):
    return [values.mean().item(), (values.std()/len(values)**0.5).item()]

def coders(images):
    "Bits per dimension, mean over the images; LZMA also for all of them in one go."
    def size_as(image, **options):
        with io.BytesIO() as file:
            to_pil(image).save(file, **options)
            return len(file.getvalue())
    dims = images[0].numel()
    shares = images.flatten().bincount(minlength=256).double()/images.numel()
    found = {"PNG": [8*size_as(image, format="PNG", optimize=True)/dims for image in images],
             "WebP, lossless": [8*size_as(image, format="WebP", lossless=True, quality=100, method=6)/dims
                                for image in images],
             "LZMA, all in one": [8*len(lzma.compress(images.numpy().tobytes(), preset=9))/images.numel()],
             "single pixels": [-(shares[shares > 0]*shares[shares > 0].log2()).sum().item()]}
    return {name: sum(bits)/len(bits) for name, bits in found.items()}

def in_batches(measure, data, size=250):
    "Calls measure(images, labels) on parts, and joins what it returns."
    return torch.cat([measure(data.images[i:i + size], data.labels[i:i + size])
                      for i in range(0, len(data), size)])

def bound_of(model, scheduler, data, num_times, seed=0):
    "Mean and standard error of the three parts and the total."
    generator = random_generator(seed)
    def parts(images, labels):
        bound = variational_bound(model, scheduler, images, generator=generator, num_times=num_times,
                                  labels=labels)
        return torch.stack([*bound, bound.total], dim=1)
    names = ("prior", "diffusion", "reconstruction", "total")
    return {name: mean_and_error(value) for name, value in zip(names, in_batches(parts, data).T)}

def finer(model, scheduler, factor):
    "The same path with `factor` times as many steps, and the network told the times between its own."
    places = torch.arange((len(scheduler) - 1)*factor + 1, dtype=torch.float64)/factor
    angle = torch.atan2(scheduler.sigma, scheduler.signal)
    low = places.long().clamp(max=len(scheduler) - 2)
    between = angle[low] + (places - low)*(angle[low + 1] - angle[low])
    path = NoiseScheduler(between.cos(), between.sin(), prediction_type=scheduler.prediction_type)
    return (lambda x, t, **cond: model(x, t/factor, **cond)), path

def learn_variance(model, config, data, steps):
    "The network again, trained for one more epoch with the hybrid loss."
    taught = replace(config, model=replace(config.model, learned_variance=True))
    network = new_model(taught)
    weights = model.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"): # the new channels start with zeros
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])])
    network.load_state_dict(weights)
    train = TrainConfig(epochs=1, max_steps=steps, batch_size=64, lr=2e-4, warmup_steps=50, lr_decay=True)
    state, objective = new_state(network, train), hybrid_objective(config.scheduler.build(), 0.1)
    precision = choose_precision("auto", torch.device("cpu"))
    for step in train_steps(state, data, objective, train, precision):
        if step.step % 100 == 0:
            print(f"learning the variance: step {step.step}, loss {step.loss:.4f}", flush=True)
    return partial(state.ema, with_variance=True)

def add_options(parser):
    parser.add_argument("--num_images", type=int, default=8000)
    parser.add_argument("--num_flow", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("outputs/likelihood.json"))

def parse_arguments():
    args = parse_common(__doc__, add_options)
    if args.docs: args.output = Path(__file__).resolve().parent.parent/"nbs"/"likelihood.json"
    if args.quick: args.num_images, args.num_flow = 20, 4
    return args

def main():
    args = parse_arguments()
    if args.quick: train, test = load_sample("train"), load_sample("test")
    else: train, test = (load_fashion_mnist(args.data_root, split) for split in ("train", "test"))
    test = test[:args.num_images]
    flow_data, times, flow_steps = test[:args.num_flow], 3 if args.quick else 10, 4 if args.quick else 120
    model, config = load_pretrained("small")
    scheduler = config.scheduler.build()
    label_bits = math.log2(len(config.classes))/test.images[0].numel()  # to say which class it is
    found = dict(num_images=len(test), num_flow=len(flow_data), num_times=times, flow_steps=flow_steps,
                 label_bits=label_bits, coders=coders(flow_data.images))
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def keep(name, value):
        found[name] = value
        print(name, value, flush=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    keep("bound", bound_of(model, scheduler, test, times))
    generator = random_generator(1)
    def by_flow(images, labels):
        return flow_bits(model, scheduler, images, generator=generator, num_inference_steps=flow_steps,
                         spacing="log_snr", labels=labels)
    keep("flow", mean_and_error(in_batches(by_flow, flow_data)))
    keep("bound_of_flow_images", bound_of(model, scheduler, flow_data, 3*times))
    keep("bound_8_times_finer", bound_of(*finer(model, scheduler, 8), flow_data, 3*times))
    learned = learn_variance(model, config, train, 2 if args.quick else None)
    keep("bound_with_learned_variance", bound_of(learned, scheduler, test, times))
    keep("bound_with_learned_variance_of_flow_images", bound_of(learned, scheduler, flow_data, 3*times))

if __name__ == "__main__": main()
