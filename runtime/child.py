"""Running a function in another process, so that its memory does not count under this one's cap.

    result = call("edge_moe.bench.sweep", {"ram": 1}, killed="...")  # here
    if __name__ == "__main__": answer(function)                      # there: prints function(ram=1) as JSON

The answer is one line on the child's stdout; an expected error of the child is raised again here.
"""

import json
import os
import subprocess
import sys

ERRORS = {kind.__name__: kind for kind in (ValueError, MemoryError, FileExistsError, FileNotFoundError)}


def call(module: str, arguments: dict, killed: str, **environment: str):
    """Run `module` as a program with `arguments` and return its answer. killed: the message if the system killed it.

    Raises the child's error: one of ERRORS by its name, OSError for any other.
    """
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if child.returncode == 0:
        return json.loads(child.stdout)
    kind, _, message = child.stdout.strip().partition(": ")
    unexpected = child.stderr.strip().splitlines()[-1:] if child.returncode > 0 else []
    raise ERRORS.get(kind, OSError)(message or "".join(unexpected) or killed)


def answer(function) -> None:
    """Call function(**arguments) with the arguments of this program, and print its result or its error."""
    try:
        print(json.dumps(function(**json.loads(sys.argv[1]))))
    except (ValueError, OSError, MemoryError) as error:
        kind = next((name for name, kind in ERRORS.items() if isinstance(error, kind)), "OSError")
        print(f"{kind}: {error}")
        sys.exit(1)
