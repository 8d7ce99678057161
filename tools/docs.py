"""Builds the site in _docs without a network: smalldocs gets what `nbdev_docs` would give to Quarto
(processed notebooks and _quarto.yml).

usage: python tools/docs.py [FOLDER]          default: _docs; a link to a page that does not exist is an error
"""
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent

def rewrite(path: Path, change):
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

def name_as_linked(folder: Path):
    """Renames the notebooks everywhere, for instance 05_scheduler.ipynb to scheduler.ipynb.

    Quarto takes the name of a page from `output-file`, smalldocs from the notebook.
    """
    notebooks = list(folder.glob("*.ipynb"))
    new = {path.name: _nbpath2html(path.relative_to(folder)).with_suffix(".ipynb").name for path in notebooks}
    def renamed(text):
        text = re.sub(r'\s*"output-file: .*\\n",', "", text)
        return re.sub(r"\b\d\d[a-z]?_\w+\.ipynb", lambda found: new.get(found[0], found[0]), text)
    for path in [*notebooks, folder/"_quarto.yml"]: rewrite(path, renamed)
    for old, name in new.items(): (folder/old).rename(folder/name)

def link_within(folder: Path):
    "nbdev links to a function on the published site. Here its page is in the same folder."
    config = get_config()
    published = config.doc_host.rstrip("/") + "/" + config.doc_baseurl.strip("/") + "/"
    for path in folder.glob("*.ipynb"): rewrite(path, lambda text: text.replace(published, "./"))

def leave_the_network(site: Path):
    "KaTeX comes from this repository, fonts from the reader's machine."
    shutil.copytree(ROOT/"tools"/"katex", site/"site_libs"/"katex")
    def local_katex(text):
        return re.sub(r'https://[^"]+/katex@[\d.]+/dist(/contrib)?', "site_libs/katex", text)
    def no_imports(text): return re.sub(r"@import url\(https://[^)]*\);", "", text)
    for page in site.glob("*.html"): rewrite(page, local_katex)
    for theme in site.glob("site_libs/themes/*.css"): rewrite(theme, no_imports)

def main():
    warnings.simplefilter("ignore", SyntaxWarning)
    work, site = ROOT/"_proc_site", Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/"_docs").resolve()
    for folder in (work, site): shutil.rmtree(folder, ignore_errors=True)
    os.chdir(ROOT)                                      # nbdev reads settings.ini from here
    shutil.copytree(proc_nbs(n_workers=0, force=True), work)
    name_as_linked(work)
    link_within(work)
    done = subprocess.run([Path(sys.executable).parent/"smalldocs", "render", "--strict", "--quiet", work])
    if not (work/"_docs").exists(): sys.exit("error: smalldocs made no site, see its messages above")
    shutil.move(work/"_docs", site)
    shutil.rmtree(work)
    leave_the_network(site)
    if done.returncode: sys.exit("error: the site has faults, see the warnings above")
    print(f"{len(list(site.glob('*.html')))} pages. To read and search them: "
          f"python -m http.server --directory {site}, and open http://localhost:8000")

if __name__ == "__main__": main()
