"""Estimates how long it takes to work through a lesson, by one rule for all of them.

usage: python tools/hours.py [--write]

The rule: 150 words a minute, half a minute for each code cell, ten minutes for each exercise. --write puts
the estimates into the table of nbs/index.ipynb, in half hours. Run tools/readme.py afterwards.
"""
import json
import re
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent/"nbs"

def minutes(path: Path) -> float:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    def texts(kind): return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]
    words = " ".join(texts("markdown")).split()
    code = texts("code")
    exercises = sum('#| code-summary: "The checker"' in source for source in code)
    return len(words)/150 + 0.5*len(code) + 10*exercises

def lessons(): # from 95 on, the notebooks are for looking things up
    return [path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if int(path.name[:2]) < 95]

def in_halves(estimate: float) -> str:
    halves = max(1, round(estimate/30))
    half = "½" if halves % 2 else ""
    return f"{halves//2 or ''}{half}"

def write(index: Path):
    notebook = json.loads(index.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        for path in lessons():
            row = rf"(?m)^(\| \d\d[a-z]? \| .*?\({path.name}\) \|) [\d½]+ \|"
            text = re.sub(row, rf"\1 {in_halves(minutes(path))} |", text)
        cell["source"] = text.splitlines(keepends=True)
    index.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

def main():
    if "--write" in sys.argv: write(NOTEBOOKS/"index.ipynb")
    estimates = {path.stem: minutes(path) for path in lessons()}
    for name, value in estimates.items(): print(f"{name:20}{value/60:5.1f} hours")
    print(f"{'all':20}{sum(estimates.values())/60:5.1f} hours")

if __name__ == "__main__": main()
