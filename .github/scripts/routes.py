"""Do automatic routes go where they should here? python .github/scripts/routes.py --device cuda --expect sdpa

Every operation's, or those of --op, by `nsa-routing explain` and with the flags of the environment.
"""

import argparse
import json
import subprocess
import sys


def main(words: list[str] | None = None) -> int:
    """Print each operation's backend, return whether one is another than expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", required=True)
    parser.add_argument("--expect", required=True, metavar="BACKEND")
    parser.add_argument("--op", action="append", default=[], help="only this; repeatable")
    arguments = parser.parse_args(words)
    explain = ["nsa-routing", "explain", "--json", "--device", arguments.device]
    found = json.loads(subprocess.run(explain, stdout=subprocess.PIPE, check=True, text=True).stdout)
    taken = {plan["op"]: plan["backend"] for plan in found["plans"]}
    unknown = set(arguments.op) - taken.keys()
    if unknown:
        raise SystemExit(f"--op: expected some of {', '.join(taken)}, got {', '.join(sorted(unknown))}")
    taken = {op: backend for op, backend in taken.items() if op in (arguments.op or taken)}
    for op, backend in taken.items():
        print(f"{'ok' if backend == arguments.expect else 'FAILED':7} {op}: {backend}")
    return int(not taken or set(taken.values()) != {arguments.expect})


if __name__ == "__main__":
    sys.exit(main())
