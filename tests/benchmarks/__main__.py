"""Run all benchmarks, or those named: ``python -m tests.benchmarks [NAME ...]``."""

import importlib
import pkgutil
import sys

from tests import benchmarks


def main(names):
    """Run the benchmarks in `names`, or all; return the exit status."""
    known = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    known = [name for name in known if name.startswith("bench_")]
    wrong = [name for name in names if name not in known]
    if wrong:
        print(f"no benchmark {wrong[0]!r}: there are {', '.join(known)}", file=sys.stderr)
        return 1
    for name in names or known:
        module = importlib.import_module(f"tests.benchmarks.{name}")
        print(f"\n== {name}: {(module.__doc__ or '').strip().splitlines()[0]}", flush=True)
        sys.argv[1:] = []  # a module's own options are those of its own command
        module.main()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
