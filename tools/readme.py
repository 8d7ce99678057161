"""Makes README.md from nbs/index.ipynb, without Quarto.

usage: python tools/readme.py [--check]      --check: change nothing, exit with 1 if README.md is out of date
"""
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent

def readme(index: Path) -> str:
    "The text cells and the visible code cells, with links that start at the top of the repository."
    parts = []
    for cell in nbformat.read(index, 4).cells:
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif "#| hide" not in cell.source:
            code = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            parts.append(f"```python\n{code}\n```")
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"\]\((?!https?:|#)", "](nbs/", text) # images and lessons are in the folder of index.ipynb

def main():
    file, wanted = ROOT/"README.md", readme(ROOT/"nbs"/"index.ipynb")
    if "--check" not in sys.argv: file.write_text(wanted, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != wanted:
        sys.exit("error: README.md is out of date; run python tools/readme.py")

if __name__ == "__main__": main()
