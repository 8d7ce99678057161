"""The house rules: who may import from whom, one place for each symbol, light imports.

The tests read files only.
"""
import ast
import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

import ddpm_tutorial

PACKAGE = Path(ddpm_tutorial.__file__).parent
NOTEBOOKS = PACKAGE.parent/"nbs"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("_"))


def dotted(path):
    "The name of a module within the package, e.g. `data` or `run.train`."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


each_module = pytest.mark.parametrize("module", MODULES, ids=dotted)


def lesson_numbers():
    """Module name to the number of the lesson that exports it, for instance "10".

    A companion has its lesson's number with a letter, for instance "10b", so numbers sort as the lessons do.
    Lessons that are not written yet have none.
    """
    numbers = {}
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            found = re.search(r"^#\s*\|\s*default_exp\s+([\w.]+)", "".join(cell["source"]), re.MULTILINE)
            if cell["cell_type"] != "code" or not found: continue
            numbers[found[1]] = re.match(r"\d\d[a-z]?", path.name)[0]
    return numbers


def points_upward(module, other, numbers):
    """Whether a module may not import another.

    Only `run` imports from `run`; otherwise only lower numbers are allowed.
    """
    in_run, other_in_run = module.startswith("run."), other.startswith("run.")
    if in_run != other_in_run: return other_in_run
    return numbers[other] >= numbers[module]


def imports(path):
    """(dotted name, line, whether inside a function) of everything that a module imports.

    Relative names are made absolute.
    """
    def visit(node, inside):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = [node.module]
            if node.level:
                folder = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]        # where the dots begin
                base = [*folder[:len(folder) - node.level + 1], node.module]
            base = ".".join(filter(None, base))
            yield from ((f"{base}.{alias.name}", node.lineno, inside) for alias in node.names)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node): yield from visit(child, inside)
    return list(visit(ast.parse(path.read_text(encoding="utf-8")), False))


def defined_names(node):
    "The names that a statement of a module defines."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): return [node.name]
    if not isinstance(node, (ast.Assign, ast.AnnAssign)): return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def definitions(path):
    """(name, place) of every public symbol of a module.

    The place is the notebook and cell that nbdev wrote above it.
    """
    text = path.read_text(encoding="utf-8")
    cells = [(number, line[5:]) for number, line in enumerate(text.splitlines(), 1)
             if re.match(r"# %% .*\.ipynb", line)]
    for node in ast.parse(text).body:
        above = [place for number, place in cells if number < node.lineno]
        place = above[-1] if above else f"{path.name} line {node.lineno}"
        yield from ((name, place) for name in defined_names(node) if not name.startswith("_"))


def test_there_is_something_to_read():
    "The rules below must not hold merely because nothing was found."
    numbers = lesson_numbers()
    assert {"data", "attention", "unet", "training", "run.config", "run.train"} <= numbers.keys()
    assert len(MODULES) >= 20
    assert len(set(numbers.values())) == len(numbers) and set(map(dotted, MODULES)) == numbers.keys()
    imported = [name for name, _, _ in imports(PACKAGE/"run"/"train.py")]
    assert any(name.startswith("ddpm_tutorial.run.config.") for name in imported)
    assert any(name.startswith("ddpm_tutorial.data.") for name in imported)


def test_what_points_upward():
    "Within a group it goes by number and letter. A part never imports from `run`."
    numbers = {"data": "01", "training": "07", "exercises": "17", "run.config": "10", "run.device": "10b",
               "run.checkpoint": "11"}
    allowed = [("training", "data"), ("run.device", "run.config"), ("run.checkpoint", "run.device"),
               ("run.config", "exercises"), ("run.config", "data")]
    refused = [("data", "training"), ("run.config", "run.device"), ("run.device", "run.checkpoint"),
               ("exercises", "run.config"), ("data", "run.config"), ("data", "data")]
    assert not any(points_upward(*pair, numbers) for pair in allowed)
    assert all(points_upward(*pair, numbers) for pair in refused)


@each_module
def test_no_import_points_upward(module):
    "A lesson imports only from lower numbers of its group, and a part never from `run`."
    numbers, wrong, name = lesson_numbers(), [], dotted(module)
    for full, line, _ in imports(module):
        if full.split(".")[0] != PACKAGE.name: continue
        within = full.removeprefix(f"{PACKAGE.name}.")
        if within.split(".")[0] == "run" and (within == "run" or not name.startswith("run.")):
            wrong.append(f"{name} line {line}: a part imports {within}")
        other = next((other for other in numbers if f"{within}.".startswith(f"{other}.")), None)
        if other and points_upward(name, other, numbers):
            wrong.append(f"{name} line {line}: lesson {numbers[name]} imports from {other}, "
                         f"lesson {numbers[other]}")
    assert not wrong, "\n".join(wrong)


def test_no_symbol_is_exported_twice():
    "Each symbol is defined in one place."
    places = defaultdict(list)
    for module in MODULES:
        for name, place in definitions(module): places[name].append(place)
    twice = [f"{name}: {' and '.join(found)}" for name, found in places.items() if len(found) > 1]
    assert not twice, "\n".join(twice)


@each_module
def test_wandb_is_imported_in_tracking_only(module):
    "And only inside a function: with `--no-wandb` it is not even imported."
    def allowed(inside): return inside and dotted(module) == "run.tracking"
    wrong = [line for name, line, inside in imports(module)
             if name.split(".")[0] == "wandb" and not allowed(inside)]
    assert not wrong, f"{module.name} imports wandb in lines {wrong}"


@each_module
def test_matplotlib_is_not_imported_at_the_top(module):
    "A run on a server needs no drawing library. A function that draws imports it."
    wrong = [line for name, line, inside in imports(module)
             if name.split(".")[0] == "matplotlib" and not inside]
    assert not wrong, f"{module.name} imports matplotlib at the top, in lines {wrong}"


def test_links_lead_somewhere():
    "Every relative link and picture in the lessons and in the README names a file that exists."
    def broken(path, text):
        links = re.findall(r"\]\(((?!https?:|#)[^)#]+)", text)
        return [f"{path.name}: {link}" for link in links if not (path.parent/link).exists()]
    wrong = broken(NOTEBOOKS.parent/"README.md", (NOTEBOOKS.parent/"README.md").read_text(encoding="utf-8"))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown": wrong += broken(path, "".join(cell["source"]))
    assert not wrong, "\n".join(wrong)


def prose(name):
    "The lines of a notebook's text cells."
    cells = json.loads((NOTEBOOKS/name).read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [line for text in texts for line in text.splitlines()]


def named_tests(rows):
    "(file, test) for each row of a table. All of them must exist."
    tests = {(path.name, name) for path in Path(__file__).parent.glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    named = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in rows]
    assert not [name for row in named for name in row if name not in tests]
    return named


def test_each_fault_has_its_tests():
    "The table of lesson 94: each row names a test, and every test that it names exists."
    rows = [line for line in prose("94_faults.ipynb") if line.startswith("| ")][1:] # the first is the head
    assert len(rows) >= 20 and all(named_tests(rows))


def test_each_question_is_answered_where_it_says():
    "Lesson 95: every section that it names is a heading of that lesson, and every test exists."
    rows = [line for line in prose("95_questions.ipynb") if line.startswith("**")]
    places = [re.findall(r"\((\d\d[a-z]?_\w+\.ipynb)\),((?: (?:and )?\*[^*]+\*)+)", row) for row in rows]
    assert len(rows) >= 20 and all(places) and sum(map(bool, named_tests(rows))) >= 15
    assert all(len(found) == row.count(".ipynb)") for found, row in zip(places, rows))
    for name, sections in (place for row in places for place in row):
        headings = {line.lstrip("# ") for line in prose(name) if re.match("##+ ", line)}
        for section in re.findall(r"\*([^*]+)\*", sections):
            assert section in headings, f"{name} has no section {section!r}"


def test_the_sidebar_has_every_lesson():
    "The sidebar shows each lesson with its number and its title."
    sidebar = (NOTEBOOKS.parent/"_quarto.yml").read_text(encoding="utf-8")
    for path in NOTEBOOKS.glob("[0-9]*.ipynb"):
        title = next(line for line in prose(path.name) if line.startswith("# ")).removeprefix("# ")
        assert f'{{text: "{path.name.split("_")[0]} {title}", href: {path.name}}}' in sidebar, path.name


def test_symbols_are_variables():
    "Each name in the code column of lesson 96 occurs in the package."
    words = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in MODULES)))
    code = " ".join(re.findall(r"`([^`]+)`", "\n".join(prose("96_symbols.ipynb"))))
    names = set(re.findall(r"[A-Za-z_]\w*", code))
    assert len(names) >= 25 and not names - words


def code_cells():
    "(notebook and cell, source) of every code cell, without the lines that only Jupyter understands."
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield f"{path.name} {cell['id']}", re.sub(r"(?m)^[%!].*$", "", "".join(cell["source"]))


def test_every_grid_of_pictures_has_words():
    "Each call of `show_images` gives titles or row titles."
    def silent(call):
        named = isinstance(call.func, ast.Name) and call.func.id == "show_images"
        keywords = {keyword.arg for keyword in call.keywords}
        return named and len(call.args) < 2 and not {"titles", "row_titles"} & keywords
    calls = [(place, node) for place, source in code_cells() for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call)]
    wrong = [place for place, call in calls if silent(call)]
    assert not wrong, "\n".join(wrong)


def bars_on_a_logarithmic_axis(source):
    """Names of axes in a cell whose bars run along an axis that the cell makes logarithmic.

    A histogram drawn as a line (`histtype="step"`) has no bars.
    """
    for line in source.splitlines():
        for name, kind in re.findall(r"([\w.\[\]]+)\.(bar|barh|hist)\(", line):
            axis, these = "x" if kind == "barh" else "y", re.escape(name)
            scale = (rf"""{these}\.(set\([^\n]*{axis}scale=["']log|set_{axis}scale\(["']log"""
                     rf"""|{axis}scale\(["']log|semilog{axis}\(|loglog\()""")
            if 'histtype="step"' not in line and ("log=True" in line or re.search(scale, source)): yield name


def test_no_bars_on_a_logarithmic_axis():
    "A bar shows a number by its length. On a logarithmic axis, its length depends on where the axis begins."
    assert list(bars_on_a_logarithmic_axis('axis.bar(x, y)\naxis.set(xlabel="x", yscale="log")')) == ["axis"]
    assert not list(bars_on_a_logarithmic_axis('left.set(yscale="log")\nright.bar(x, y)'))
    wrong = [place for place, source in code_cells() if list(bars_on_a_logarithmic_axis(source))]
    assert not wrong, "\n".join(wrong)


def test_hours_of_the_lessons():
    "Each figure on the front page follows from the rule of tools/hours.py, to half an hour."
    spec = importlib.util.spec_from_file_location("hours", NOTEBOOKS.parent/"tools"/"hours.py")
    hours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hours)
    row = r"(?m)^\| \d\d[a-z]? \| .*?\((\d\d[a-z]?_\w+\.ipynb)\) \| (\d?½?) \|"
    said = {}
    for name, figure in re.findall(row, "\n".join(prose("index.ipynb"))):
        if not figure: continue
        said[name] = float(figure.rstrip("½") or 0) + (0.5 if figure.endswith("½") else 0)
    lessons = [path for path in NOTEBOOKS.glob("[0-9]*.ipynb") if int(path.name[:2]) < 95]
    rule = {path.name: hours.minutes(path)/60 for path in lessons}
    assert said.keys() == rule.keys()
    assert not {name: value for name, value in rule.items() if abs(value - said[name]) > 0.5}


def test_one_version_everywhere():
    "The package, its citation and the top of the changelog name the same version."
    root = PACKAGE.parent
    cited = re.search(r"(?m)^version: (.+)$", (root/"CITATION.cff").read_text())[1]
    newest = re.search(r"(?m)^## (\S+)$", (root/"CHANGELOG.md").read_text())[1]
    assert cited == ddpm_tutorial.__version__ and newest in (cited, "Unreleased")
