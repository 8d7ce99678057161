"""What pytest with nbval must know about nbdev's notebooks: cells that are not to be run, and outputs without execution counts.
And every cell runs twice in a row, as learners do: what fails only then has used up something that it needs."""
import re
import signal
from configparser import ConfigParser
from functools import partial
from pathlib import Path

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent/"settings.ini", encoding="utf-8")
flags = "|".join(config["DEFAULT"]["tst_flags"].split())
not_run = re.compile(rf"^\s*#\s*\|\s*(eval:\s*false|{flags})\s*$", re.M | re.I)

# under nohup it is ignored, also by the processes that the tests start and send it to
if hasattr(signal, "SIGHUP"): signal.signal(signal.SIGHUP, signal.SIG_DFL)

def twice(run):
    run()
    run()

def pytest_collection_modifyitems(items):
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None: continue # an ordinary test
        if not_run.search(cell.source): item.options["skip"] = True
        if cell.get("outputs") and cell.get("execution_count") is None: cell["execution_count"] = 1 # nbdev_clean removed it; nbval wants one
        item.runtest = partial(twice, item.runtest)
