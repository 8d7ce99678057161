"Exercises: four cells each, at least two typical wrong answers, and the checker has said of the empty function that there is nothing yet, of the solution that it is right."
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_tutorial.exercises import exercise

LESSONS = [path for path in sorted((Path(__file__).parent.parent/"nbs").glob("[0-9]*.ipynb")) if not 95 <= int(path.name[:2]) <= 98]   # those are to look things up
EMPTY = r"Not yet\. Your function returned None\. Did you forget `return`\?"

def parts(path):
    "For each checker: the empty function before it, itself, and the solution behind it. nbval compares what they print with what is stored (tests run them)."
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    source = lambda cell: "".join(cell["source"])
    return [(source(cells[i - 1]), cells[i], cells[i + 1]) for i, cell in enumerate(cells) if '#| code-summary: "The checker"' in source(cell)]

@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_each_lesson_has_exercises(path):
    "At least two. A companion, which has a letter after its number, may have one or none."
    found = parts(path)
    assert len(found) >= 2 or re.match(r"\d\d[a-z]_", path.name)
    for empty, checker, solution in found:
        said = ["".join("".join(output.get("text", "")) for output in cell["outputs"]) for cell in (checker, solution)]
        code = "".join(checker["source"])
        assert re.search(r"^def \w+\(.*\):.*\n    \.\.\.$", empty, re.MULTILINE), "an empty function comes before the checker"
        assert code.count("exercise(") == 1 and len(re.findall(r'(?m)^ +typical=\{"|^ {13}"', code)) >= 2, "two typical wrong answers"
        assert re.fullmatch(rf"(\w+: )?{EMPTY}\n", said[0]) and re.match(r"(solution: )?(Exact|Close enough), in (\d) of \3 cases", said[1])
        for cell in (checker, solution):
            assert cell["metadata"] == {"jupyter": {"source_hidden": True}, "tags": ["nbval-check-output"]}
            assert "".join(cell["source"]).startswith("#| code-summary: ")   # the line that is left of a folded cell in JupyterLab

def exercise_headings(path):
    "(number, words) of each."
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown"]
    return re.findall(r"(?m)^### (\d+)\. (.*)", "\n".join("".join(cell["source"]) for cell in cells))

@pytest.mark.parametrize("path", [path for path in LESSONS if not path.name.startswith("90")], ids=lambda path: path.stem)   # programs with errors: one kind of its own
def test_exercises_are_of_several_kinds(path):
    "A guess, a derivation, an experiment: each exercise says what it is, and no lesson has one kind only."
    headings = exercise_headings(path)
    kinds = [re.match(r"(Predict|Derive|Experiment): \S", words) for _, words in headings]
    assert all(kinds), [words for (_, words), kind in zip(headings, kinds) if not kind]
    assert [int(number) for number, _ in headings] == list(range(1, len(parts(path)) + 1))
    together = [words for other in LESSONS if other.name[:2] == path.name[:2] for _, words in exercise_headings(other)] # with its companions
    assert len({words.split(":")[0] for words in together}) >= 2

def test_forty_and_more(): assert sum(len(parts(path)) for path in LESSONS) >= 40

STRANGE = [None, "3", {}, [], [[]], [None], [1, [2, 3]], 3 + 2j, torch.tensor(1j), np.array(["a"]), np.array([1j]), torch.zeros(0), torch.zeros(2, 3, 4), float("nan"), [torch.zeros(2), torch.zeros(3)], object(), torch.tensor]

@pytest.mark.parametrize("right", [3., torch.tensor([2., 4.]), [(4, 2), (2, -1)], [torch.zeros(2), torch.ones(1, 1)], (torch.tensor(1.), 2)], ids=repr)
def test_a_checker_never_raises(right, capsys):
    "Whatever comes back, one line is said about it; and what is right is right as a list, a tensor or an array."
    check = exercise(lambda: right, (), typical={"That is nothing of the kind.": lambda: -100.})
    for answer in STRANGE:
        check(lambda: answer)
        assert capsys.readouterr().out.startswith("Not yet")
    same = [right, list(right) if isinstance(right, tuple | list) else right, np.asarray(right) if isinstance(right, float | torch.Tensor) else right]
    for answer in same:
        check(lambda: answer)
        assert capsys.readouterr().out.startswith("Exact")
