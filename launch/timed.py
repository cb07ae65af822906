"""Runs a command and enters its seconds and largest process into a JSON file: timed.py FILE NAME -- COMMAND …
(or timed.py FILE NAME --took SECONDS, for what was done already).

Of a part that ran several times the longest run counts: the others found little or nothing left to do.
"""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

file, name, option, *words = Path(sys.argv[1]), *sys.argv[2:]
code, figures = 0, {}
if option == "--took":
    figures = {"seconds": float(words[0])}
else:
    began = time.monotonic()
    child = subprocess.Popen(words)
    # Ctrl-C goes to both, and the command may have to save first; other signals are passed on.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    for passed_on in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(passed_on, lambda number, frame: child.send_signal(number))
    code = child.wait()
    code = code if code >= 0 else 128 - code
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    figures = {"seconds": round(time.monotonic() - began, 1), "largest_process_bytes": peak}
if code == 0:
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = json.loads(file.read_text()) if file.exists() else {}
    if figures["seconds"] > parts.get(name, {}).get("seconds", 0):
        parts[name] = figures
    whole = file.with_name(f".{file.name}.partial")
    whole.write_text(json.dumps(parts, indent=1) + "\n")
    whole.replace(file)
sys.exit(code)
