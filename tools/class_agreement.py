"""Which share of the samples does a classifier put into the class that was asked for?

usage: python tools/class_agreement.py samples.npz [--data_root DIR] [--epochs 6] [--classifier FILE]

Trains a small classifier on the 60,000 images (minutes on two cores; kept in FILE, by default outputs/classifier.pth, and taken from there
the next time, whatever --epochs says), prints its accuracy on
the 10,000 test images, and then the agreement for `samples.npz` (arr_0 uint8 [n, h, w, c], arr_1 labels: what `ddpm_sample --output x.npz`
writes), class by class. It shares nothing with the diffusion model but the data.
"""
import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ddpm_tutorial.data import CLASSES, batches, load_fashion_mnist, load_images, to_float

def make_classifier():
    conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv(1, 32), conv(32, 32), nn.MaxPool2d(2), conv(32, 64), conv(64, 64), nn.MaxPool2d(2),
                         conv(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10))

@torch.no_grad()
def predict(model, images):
    model.eval()
    return torch.cat([model(to_float(x)).argmax(1) for x in images.split(500)])

def train_classifier(data_root, epochs):
    data = load_fashion_mnist(data_root)
    torch.manual_seed(0)
    model = make_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    steps = epochs * -(-len(data)//128)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        for x, labels in batches(data, 128, generator=generator):
            flip = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad(); loss.backward(); optimizer.step(); rate.step()
        print(f"classifier: epoch {epoch + 1} of {epochs}, last loss {loss.item():.3f}", flush=True)
    return model

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--classifier", type=Path, default=Path("outputs/classifier.pth"))
    args = parser.parse_args()

    if args.classifier.exists():
        model = make_classifier()
        model.load_state_dict(torch.load(args.classifier, weights_only=True))
    else:
        model = train_classifier(args.data_root, args.epochs)
        args.classifier.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.classifier)
    test = load_fashion_mnist(args.data_root, "test")
    accuracy = (predict(model, test.images) == test.labels).float().mean()
    print(f"accuracy on the {len(test):,} test images: {accuracy:.4f}")

    samples = load_images(args.samples)
    right = (predict(model, samples.images) == samples.labels).float()
    for label in samples.labels.unique():
        mine = right[samples.labels == label]
        print(f"{CLASSES[label]:12} {mine.mean():.3f} of {len(mine)}")
    error = (right.mean()*(1 - right.mean())/len(right)).sqrt()
    print(f"class agreement: {right.mean():.3f} +- {error:.3f} over {len(right):,} samples")

if __name__ == "__main__": main()
