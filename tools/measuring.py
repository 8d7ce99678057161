"What the scripts share that measure samples of `small` for several seeds."
import argparse
import json
from pathlib import Path

from ddpm_tutorial.data import CLASSES, ImageData, load_fashion_mnist, load_sample
from ddpm_tutorial.run.config import SamplingConfig
from ddpm_tutorial.run.device import label_conditions
from ddpm_tutorial.run.sample import draw_samples
from ddpm_tutorial.training import Stream, random_generator

EVERYWHERE = SamplingConfig(guidance_scale=1.3) # how `small` drew in version 1, and still does in comparisons

def parse_common(doc, add_more):
    "The options of every such script, and those that `add_more` adds to the parser."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_more(parser)
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick and args.docs: parser.error("--quick measures nothing that belongs in the docs")
    return args

def parse_arguments(doc, name, quick_samples, add_more=lambda parser: None):
    "Options of a script that writes outputs/`name`, or nbs/`name` for the lessons."
    def add_options(parser):
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--num_samples", type=int, default=1000)
        parser.add_argument("--output", type=Path, default=Path("outputs")/name)
        add_more(parser)
    args = parse_common(doc, add_options)
    if args.docs: args.output = Path(__file__).resolve().parent.parent/"nbs"/name
    if args.quick: args.num_samples = quick_samples
    return args

def parse_folder_arguments(doc, name, add_more):
    "Options of a script that keeps its trainings in outputs/`name`."
    def add_options(parser):
        add_more(parser)
        parser.add_argument("--output_dir", type=Path, default=None)
    args = parse_common(doc, add_options)
    if args.output_dir is None: args.output_dir = Path("outputs")/(f"{name}_quick" if args.quick else name)
    return args

def real_images(args):
    "Training images, and test images."
    if args.quick: return load_sample("train"), load_sample("test")
    return load_fashion_mnist(args.data_root, "train"), load_fashion_mnist(args.data_root, "test")

def load_result(output, settings):
    "What an earlier call has measured with the same settings."
    result = json.loads(output.read_text()) if output.exists() else {**settings, "rows": []}
    if {name: result.get(name) for name in settings} != settings: # an older file may lack one
        raise SystemExit(f"{output} was measured with other settings: move it away")
    return result

def draw(model, config, labels, seed, precision):
    "Samples, with the labels that were asked for."
    generator = random_generator(seed, Stream.SAMPLES)
    drawn = draw_samples(model, config, len(labels), label_conditions(config, labels),
                         generator=generator, precision=precision)
    return ImageData(drawn, labels, CLASSES)

def in_short(row):
    "The three metrics of a row that are printed."
    return (f"Fréchet distance {row['frechet_distance']:.4f}, "
            f"class agreement {row['class_agreement']:.3f}, coverage {row['coverage']:.3f}")
