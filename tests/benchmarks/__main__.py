"""Run all benchmarks, or those named: ``python -m tests.benchmarks [NAME ...]``."""

import argparse
import importlib
import pkgutil
import sys
import time

from tests import benchmarks


def main(argv=None):
    """Run the benchmarks named, or all; return the exit status."""
    parser = argparse.ArgumentParser(description=benchmarks.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a module, e.g. bench_phase1")
    names = parser.parse_args(argv).names
    known = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    known = [name for name in known if name.startswith("bench_")]
    wrong = [name for name in names if name not in known]
    if wrong:
        print(f"no benchmark {wrong[0]!r}: there are {', '.join(known)}", file=sys.stderr)
        return 1
    for name in names or known:
        module = importlib.import_module(f"tests.benchmarks.{name}")
        print(f"\n== {name}: {(module.__doc__ or '').strip().splitlines()[0]}")
        for options in getattr(module, "RUNS", ("",)):
            print(f"\n-- {' '.join(['python -m', module.__name__, options])}", flush=True)
            start = time.perf_counter()
            module.main(options.split())
            print(f"-- took {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
