"""Exercises have four cells each and at least two typical wrong answers.

The checker has answered "not yet" to the empty function and "right" to the solution.
"""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_tutorial.exercises import exercise

# from 95 to 98, the notebooks are for looking things up
LESSONS = [path for path in sorted((Path(__file__).parent.parent/"nbs").glob("[0-9]*.ipynb"))
           if not 95 <= int(path.name[:2]) <= 98]
EMPTY = r"Not yet\. Your function returned None\. Did you forget `return`\?"

def cells_of(path, kind):
    "(cell, source) of each cell of this kind."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell, "".join(cell["source"])) for cell in cells if cell["cell_type"] == kind]

def parts(path):
    """For each checker: the source of the empty function before it, the checker, and the solution after it.

    nbval compares what the cells print with what is stored.
    """
    cells = cells_of(path, "code")
    return [(cells[i - 1][1], cells[i][0], cells[i + 1][0]) for i, (_, source) in enumerate(cells)
            if '#| code-summary: "The checker"' in source]

def printed(cell): return "".join("".join(output.get("text", "")) for output in cell["outputs"])

@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_each_lesson_has_exercises(path):
    "At least two. A companion, which has a letter after its number, may have one or none."
    found = parts(path)
    assert len(found) >= 2 or re.match(r"\d\d[a-z]_", path.name)
    for empty, checker, solution in found:
        code = "".join(checker["source"])
        empty_function = r"^def \w+\(.*\):.*\n    \.\.\.$"
        assert re.search(empty_function, empty, re.MULTILINE), "an empty function comes before the checker"
        assert code.count("exercise(") == 1
        assert len(re.findall(r'(?m)^ +(?:typical=\{)?"', code)) >= 2, "two typical wrong answers"
        assert re.fullmatch(rf"(\w+: )?{EMPTY}\n", printed(checker))
        assert re.match(r"(solution: )?(Exact|Close enough), in (\d) of \3 cases", printed(solution))
        for cell in (checker, solution):
            assert cell["metadata"] == {"jupyter": {"source_hidden": True}, "tags": ["nbval-check-output"]}
            # the line that JupyterLab shows of a folded cell
            assert "".join(cell["source"]).startswith("#| code-summary: ")

def exercise_headings(path):
    "(number, words) of each heading of an exercise."
    text = "\n".join(source for _, source in cells_of(path, "markdown"))
    return re.findall(r"(?m)^### (\d+)\. (.*)", text)

# the exercises of lesson 90 are programs with errors, a kind of their own
@pytest.mark.parametrize("path", [path for path in LESSONS if not path.name.startswith("90")],
                         ids=lambda path: path.stem)
def test_exercises_are_of_several_kinds(path):
    """Each exercise says whether it is a prediction, a derivation or an experiment.

    No lesson has only one kind.
    """
    headings = exercise_headings(path)
    kinds = [re.match(r"(Predict|Derive|Experiment): \S", words) for _, words in headings]
    assert all(kinds), [words for (_, words), kind in zip(headings, kinds) if not kind]
    assert [int(number) for number, _ in headings] == list(range(1, len(parts(path)) + 1))
    companions = [other for other in LESSONS if other.name[:2] == path.name[:2]]
    together = [words for other in companions for _, words in exercise_headings(other)]
    assert len({words.split(":")[0] for words in together}) >= 2

def test_forty_and_more(): assert sum(len(parts(path)) for path in LESSONS) >= 40

STRANGE = [None, "3", {}, [], [[]], [None], [1, [2, 3]], 3 + 2j, torch.tensor(1j), np.array(["a"]),
           np.array([1j]), torch.zeros(0), torch.zeros(2, 3, 4), float("nan"),
           [torch.zeros(2), torch.zeros(3)], object(), torch.tensor]

RIGHT = [3., torch.tensor([2., 4.]), [(4, 2), (2, -1)], [torch.zeros(2), torch.ones(1, 1)],
         (torch.tensor(1.), 2)]

@pytest.mark.parametrize("right", RIGHT, ids=repr)
def test_a_checker_never_raises(right, capsys):
    "The checker answers anything with one line. A right answer may be a list, a tensor or an array."
    check = exercise(lambda: right, (), typical={"That is nothing of the kind.": lambda: -100.})
    for answer in STRANGE:
        check(lambda: answer)
        assert capsys.readouterr().out.startswith("Not yet")
    same = [right]
    same.append(list(right) if isinstance(right, tuple | list) else right)
    same.append(np.asarray(right) if isinstance(right, float | torch.Tensor) else right)
    for answer in same:
        check(lambda: answer)
        assert capsys.readouterr().out.startswith("Exact")
