"The site as its reader finds it, in a real browser: formulas, search, dark mode, a phone. And what no page may have: a broken link, a picture without words, a raw directive."
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("smalldocs")
from browser import chromium, needed

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("site")            # built once


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def site():
    "The folder of the finished pages. Broken links end the build."
    done = subprocess.run([sys.executable, ROOT/"tools"/"docs.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT/"_docs"


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pages(site): return {path.stem: path.read_text(encoding="utf-8") for path in site.glob("*.html")}


def test_every_notebook_has_a_page(site):
    names = {re.sub(r"^\d\d_", "", path.stem) for path in (ROOT/"nbs").glob("*.ipynb")}
    assert names == pages(site).keys()


def test_nothing_comes_from_elsewhere(site):
    "Scripts, styles, letters and pictures lie on the site itself."
    for name, page in pages(site).items():
        assert not re.findall(r'<(?:script|img)[^>]*src="https?://[^"]*"|<link[^>]*rel="stylesheet"[^>]*href="https?://[^"]*"', page), name
    for style in site.rglob("*.css"): assert not re.findall(r"(?:@import|url\()[^;]{0,9}https?://[^;]*", style.read_text(encoding="utf-8")), style


def test_every_picture_has_words(site):
    for name, page in pages(site).items():
        main = page[page.index("<main"):page.index("</main>")]
        silent = [tag for tag in re.findall(r"<img[^>]*>", main) if not re.search(r'alt="[^"]{10,}"', tag)]
        assert not silent, f"{name}: {len(silent)} pictures without a text, the first one {silent[0][-80:]}"


def test_no_directive_is_left(site):
    for name, page in pages(site).items(): assert not re.findall(r"(?m)^(?:<[^>]+>)*#\s*\|.*", page), name


def test_functions_lead_to_their_source(site):
    "Each exported function has its place in its lesson, with a link to the line in the repository."
    from ddpm_tutorial._modidx import d
    for module, symbols in d["syms"].items():
        for name, (place, _) in symbols.items():
            page, _, anchor = place.partition("#")
            if "." in name.removeprefix(module + ".") or anchor.startswith("_"): continue
            assert f'id="{anchor.lower()}"' in (site/page).read_text(encoding="utf-8").lower(), f"{name}: no {anchor} in {page}"
    assert 'href="https://github.com/ddpm-tutorial/ddpm-tutorial/blob/main/ddpm_tutorial/scheduler.py#L' in pages(site)["scheduler"]


@needed
def test_formulas(address, site):
    "All of them are set, by the site's own KaTeX, and nothing is complained of."
    formulas = 0
    with chromium() as context:
        page = context.new_page()
        for name in pages(site):
            page.goto(f"{address}/{name}.html")
            page.wait_for_function("() => [...document.querySelectorAll('.math')].every(m => m.querySelector('.katex'))")
            formulas += page.locator(".katex").count()
            assert page.locator(".katex-error").count() == 0, name
            words = page.evaluate("() => { const m = document.querySelector('main').cloneNode(true); m.querySelectorAll('pre, code, .katex, svg').forEach(e => e.remove()); return m.textContent }")
            assert not re.findall(r"\$\$|\\(?:frac|alpha|hat|sqrt|big)", words), f"{name}: a raw formula"
    assert formulas > 500 and not context.complaints


@needed
def test_search_finds_a_lesson(address):
    with chromium() as context:
        page = context.new_page()
        page.goto(f"{address}/index.html")
        page.keyboard.press("/")
        page.keyboard.type("cosine schedule")
        page.locator(".search-result", has_text="noise schedule").first.click()
        page.wait_for_url("**/scheduler.html*")
        assert "noise schedule" in page.locator("h1").inner_text() and not context.complaints


@needed
def test_dark_mode(address):
    "Paper and letters change places, and the choice goes along to the next page."
    brightness = "e => getComputedStyle(e)[%r].match(/[0-9]+/g).slice(0, 3).reduce((sum, v) => sum + Number(v), 0)/3"
    def look(page):
        page.wait_for_timeout(300)
        return [page.locator(where).first.evaluate(brightness % what) for where, what in (("body", "backgroundColor"), ("main p", "color"), (".sidebar-title a", "color"))]
    with chromium(color_scheme="light") as context:
        page = context.new_page()
        page.goto(f"{address}/embeddings.html")
        paper, letters, title = look(page)
        assert paper > 200 > 100 > max(letters, title)
        page.locator(".quarto-color-scheme-toggle").first.click()
        paper, letters, title = look(page)
        assert paper < 60 < 150 < min(letters, title)
        page.goto(f"{address}/attention.html")
        assert look(page)[0] < 60


@needed
def test_on_a_phone(address, site):
    "Nothing is wider than the screen but what scrolls by itself, and the menu opens."
    with chromium(viewport={"width": 390, "height": 800}) as context:
        page = context.new_page()
        for name in pages(site):
            page.goto(f"{address}/{name}.html")
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            overhang = page.evaluate("""() => [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 392 && ![...function*() {
                for (let p = e; p; p = p.parentElement) yield p }()].some(p => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX))).map(e => e.outerHTML.slice(0, 120))""")
            assert not overhang, f"{name}: {overhang[0]}"
