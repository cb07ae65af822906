"""Runs a command and enters its seconds and largest process into a JSON file: timed.py FILE NAME -- COMMAND …

A part keeps its first figures. Standard library only: it runs before anything is installed.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

file, name, command = Path(sys.argv[1]), sys.argv[2], sys.argv[4:]
began = time.monotonic()
code = subprocess.run(command, check=False).returncode
seconds = time.monotonic() - began
if code == 0:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = json.loads(file.read_text()) if file.exists() else {}
    parts.setdefault(name, {"seconds": round(seconds, 1), "largest_process_bytes": peak})
    file.write_text(json.dumps(parts, indent=1) + "\n")
sys.exit(code)
