"""The lessons as a learner finds them, in JupyterLab in a real browser.

Run All leaves no error, and every slider, moved by the keyboard, changes its picture.
"""
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from browser import chromium, needed, playwright

NOTEBOOKS = Path(__file__).parent.parent/"nbs"
pytestmark = needed

def sliders_of(path):
    "How many sliders each call of `interact` has."
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    calls = re.findall(r"^interact\(.*?\);", code, re.MULTILINE | re.DOTALL)
    return [len(re.findall(r"\w+Slider\(", call)) for call in calls]

WITH_SLIDERS = {path.name: found for path in sorted(NOTEBOOKS.glob("*.ipynb")) if (found := sliders_of(path))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(folder):
    "The address of a JupyterLab over a copy of the notebooks, in quick mode."
    ignored = shutil.ignore_patterns("_quarto.yml", ".ipynb_checkpoints")
    shutil.copytree(NOTEBOOKS, folder/"nbs", ignore=ignored)
    # by default, JupyterLab draws only the cells in sight, and asks for news
    settings = {"notebook-extension/tracker": '{"windowingMode": "none"}',
                "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}
    for name, text in settings.items():
        file = folder/"settings"/"@jupyterlab"/f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(DDPM_TINY="1", OMP_NUM_THREADS="1",
                                    JUPYTERLAB_SETTINGS_DIR=str(folder/"settings"),
                                    JUPYTERLAB_WORKSPACES_DIR=str(folder/"workspaces"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
               f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               "--ServerApp.disable_check_xsrf=True", "--LabApp.expose_app_in_browser=True",
               f"--ServerApp.root_dir={folder}"]
    with open(folder/"log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        for _ in range(240):
            if server.poll() is not None: raise RuntimeError((folder/"log").read_text())
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=1)
            except OSError: time.sleep(0.5)
            else: break
        else: raise TimeoutError((folder/"log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


RUN_ALL = """async () => {
    const { shell, commands } = window.jupyterapp, panel = shell.currentWidget;
    const wait = ms => new Promise(done => setTimeout(done, ms));
    const run = async () => {
        await panel.context.ready;
        await panel.sessionContext.ready;
        while (!panel.sessionContext.session?.kernel) await wait(100);
        await panel.sessionContext.session.kernel.info;             // a kernel that runs answers this
        await commands.execute("notebook:run-all-cells");
        return panel.content.model.toJSON().cells.filter(cell => cell.cell_type === "code");
    };
    const late = wait(240_000).then(() => { throw new Error("not at its end after 240 s"); });
    return await Promise.race([run(), late]);
}"""

def run_all(page, address, name):
    "Opens a notebook, runs all cells by the menu's command, and returns the errors that it shows."
    page.goto(f"{address}/lab/tree/nbs/{name}?reset", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    cells = page.evaluate(RUN_ALL)
    outputs = [output for cell in cells for output in cell["outputs"]]
    errors = [f"{output['ename']}: {output['evalue']}"
              for output in outputs if output["output_type"] == "error"]
    counts = [cell["execution_count"] for cell in cells if "".join(cell["source"]).strip()]
    assert errors or all(counts), "not every cell was run"
    return errors


def test_an_error_is_seen(lab, folder):
    "The other tests would notice an error."
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    cells = [nbformat.v4.new_code_cell("1/0")]
    broken = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(broken, folder/"nbs"/"broken.ipynb")
    with chromium() as context:
        assert run_all(context.new_page(), lab, "broken.ipynb") == ["ZeroDivisionError: division by zero"]


CHANGED = "([image, before]) => image.isConnected ? image.src !== before : true"

@pytest.mark.parametrize("name", WITH_SLIDERS)
def test_sliders(lab, name):
    with chromium(viewport={"width": 1300, "height": 1000}) as context:
        page = context.new_page()
        assert not run_all(page, lab, name)
        found = page.locator(".widget-interact")
        playwright.expect(found).to_have_count(len(WITH_SLIDERS[name]), timeout=30_000)
        for i, number in enumerate(WITH_SLIDERS[name]):
            box = found.nth(i)
            picture, handles = box.locator("img").first, box.locator(".noUi-handle")
            playwright.expect(handles).to_have_count(number, timeout=30_000)
            for k in range(number):
                before = picture.get_attribute("src")
                handles.nth(k).focus()
                # only once, or late changes of one slider would pass for those of the next
                page.keyboard.press("ArrowLeft")
                page.wait_for_function(CHANGED, arg=[picture.element_handle(), before], timeout=30_000)
                picture.wait_for(timeout=30_000)
                after = picture.get_attribute("src")
                assert after != before, f"{name}: slider {k + 1} of control {i + 1} changes nothing"


# by default only one: all of them take minutes (`make lessons`), and nbval runs each in `make test`
OTHERS = ["01_data.ipynb"]
if "DDPM_EVERY_LESSON" in os.environ:
    OTHERS = [path.name for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.name not in WITH_SLIDERS]

@pytest.mark.parametrize("name", OTHERS)
def test_run_all(lab, name):
    with chromium(viewport={"width": 1300, "height": 1000}) as context:
        assert not run_all(context.new_page(), lab, name)


def test_make_lab_opens_the_first_lesson():
    assert len(WITH_SLIDERS) >= 5
    makefile = (NOTEBOOKS.parent/"Makefile").read_text()
    assert "nbs/00_idea.ipynb" in re.search(r"^lab:.*\n\t(.*)", makefile, re.MULTILINE)[1]
