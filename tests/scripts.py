"Calls the scripts in tools/, most of which measure for hours, with --quick."
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parent.parent/"tools"

def run_script(script, *options, cwd):
    "What it says. An error if it fails."
    done = subprocess.run([sys.executable, TOOLS/script, *options], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
