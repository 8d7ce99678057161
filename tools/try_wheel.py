"""Installs a wheel into a clean virtual environment outside of the checkout, and uses it there.

usage: python tools/try_wheel.py dist/ddpm_tutorial-*.whl
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

def main():
    wheel = Path(sys.argv[1]).resolve()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DDPM_"))}
    with tempfile.TemporaryDirectory() as folder:
        def run(*command): subprocess.run(command, cwd=folder, env=clean, check=True)
        programs = Path(folder)/"venv"/"bin"
        run(sys.executable, "-m", "venv", "venv")
        run(programs/"python", "-m", "pip", "install", "--quiet", wheel)
        run(programs/"ddpm_check", "--device", "cpu")
        run(programs/"ddpm_train", "--config", "tiny", "--data", "sample", "--max_steps", "3", "--no-wandb",
            "--device", "cpu", "--output_dir", "run")
        few_steps = ["--num_inference_steps", "3", "--device", "cpu"]
        run(programs/"ddpm_sample", "--checkpoint", "run/checkpoints/best_model.pth", *few_steps,
            "--output", "grid.png")
        run(programs/"ddpm_sample", "--num_samples", "4", *few_steps)      # with the model inside the wheel
        run(programs/"ddpm_evaluate", "--data", "sample", "--num_samples", "20", "--num_inference_steps", "2",
            "--device", "cpu")
        size = (Path(folder)/"grid.png").stat().st_size
    print(f"{wheel.name} works in a clean environment: checked, trained, sampled, evaluated "
          f"({size:,} bytes of picture)")

if __name__ == "__main__": main()
