"""Checks that ddpm_tutorial/ is what the notebooks export: exports into a temporary copy and compares file by
file.

usage: python tools/check_export.py
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def export(folder: Path):
    "Exports a copy of the notebooks in `folder`. A module whose notebook is gone does not come back."
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT/name, folder/name)
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns(".*", "_quarto.yml"))
    (folder/"ddpm_tutorial").mkdir()
    # nbdev_export does nothing when IN_TEST is set
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=folder, env=environment, check=True)

def modules(folder: Path) -> dict[str, str]:
    package = folder/"ddpm_tutorial"
    return {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
            for path in package.rglob("*.py")}

def main():
    with tempfile.TemporaryDirectory() as name:
        export(Path(name))
        fresh, committed = modules(Path(name)), modules(ROOT)
    names = sorted(fresh.keys() | committed.keys())
    wrong = [name for name in names if fresh.get(name) != committed.get(name)]
    if wrong: sys.exit(f"error: not what the notebooks export: {', '.join(wrong)}; run nbdev_export")
    print(f"export: {len(fresh)} modules are in step with the notebooks")

if __name__ == "__main__": main()
