"""Runs notebooks as a reader does, top to bottom, and stores clean outputs.

usage: python tools/refresh.py [nbs/03_attention.ipynb ...]      default: all lessons, one after the other
"""
import os
import re
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parent.parent

def skipped(source: str, flags: list[str]) -> bool:
    "nbdev does not run these cells either."
    not_run = rf"^\s*#\s*\|\s*(eval:\s*false|{'|'.join(flags)})\s*$"
    return bool(re.search(not_run, source, re.M)) or "nbdev_export(" in source

class Client(NotebookClient):
    flags: list[str] = []

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and skipped(cell.source, self.flags): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)

def has_widget(cell) -> bool:
    kind = "application/vnd.jupyter.widget-view+json"
    return any(kind in output.get("data", {}) for output in cell.get("outputs", []))

def refresh(path: Path, flags: list[str], kept: list[str]):
    notebook, start = nbformat.read(path, 4), time.perf_counter()
    resources = {"metadata": {"path": str(path.parent)}}
    client = Client(notebook, timeout=600, kernel_name="python3", resources=resources)
    client.flags = flags
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    warnings = [output.text for output in outputs if output.get("name") == "stderr"]
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)     # times of each cell
        if has_widget(cell): cell.outputs = []              # a slider does nothing without its kernel
    notebook.metadata.pop("widgets", None)                  # random ids that change each time
    notebook.metadata.pop("language_info", None)
    clean_nb(notebook, allowed_cell_metadata_keys=kept)
    path.write_text(nbformat.writes(notebook, 4) + "\n", encoding="utf-8")
    print(f"{path.name}: {time.perf_counter() - start:.0f} s"
          + "".join(f"\n  stderr: {text.strip()[:300]}" for text in warnings), flush=True)

def main():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    os.environ["TQDM_DISABLE"] = "1" # progress bars are not part of a lesson's text
    flags, kept = (config["DEFAULT"][key].split() for key in ("tst_flags", "allowed_cell_metadata_keys"))
    names = sys.argv[1:] or sorted((ROOT/"nbs").glob("*.ipynb"))
    for name in names: refresh(Path(name).resolve(), flags, kept)

if __name__ == "__main__": main()
