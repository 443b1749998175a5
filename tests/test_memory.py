"""Freed blocks are kept, where the C library can do so and nobody has said otherwise."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Pages faulted in while a block of 64 MiB is made again and again.
FAULTS = """
import resource
{first}
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = b"x" * 2**26
del block
before = count()
for _ in range(10):
    block = b"x" * 2**26
    del block
print(count() - before)
"""


def python(code, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_block_made_again_finds_its_pages():
    plain = int(python(FAULTS.format(first="")))
    kept = int(python(FAULTS.format(first="import helpers")))
    if plain < 1000:
        pytest.skip("this system does not fault page by page")
    assert kept < plain / 10


def test_settings_of_the_user_stay():
    code = "from helpers.memory import keep_freed_blocks; print(keep_freed_blocks())"
    assert python(code, MALLOC_ARENA_MAX="2") == "False"
    assert python(code, LD_PRELOAD="") == "False"
    expected = platform.libc_ver()[0] == "glibc"
    assert python(code) == str(expected)
