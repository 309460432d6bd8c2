"""C source for the symbols that torch_npu links to and the emulator's own sources do not define.

    python make_stubs.py SYMBOLS OBJECT... > stubs.c

Each stub answers 207000, "feature unsupported" (the profiler's, Msprof..., answer 0), and with CANN_EMULATOR_TRACE=1
names itself on stderr: the first place to look when something new does not run.
"""

import subprocess
import sys
from pathlib import Path

PREAMBLE = """\
#include <stdio.h>
#include <stdlib.h>
static int unsupported(const char *name) {
  if (getenv("CANN_EMULATOR_TRACE")) fprintf(stderr, "[emulated CANN] a stub was called: %s\\n", name);
  return 207000;
}"""


def defined_in(objects: list[str]) -> set[str]:
    listing = subprocess.run(["nm", "--defined-only", *objects], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listing.splitlines() if " T " in line}


def main() -> None:
    symbols, *objects = sys.argv[1:]
    have = defined_in(objects)
    print(PREAMBLE)
    for name in Path(symbols).read_text(encoding="utf-8").split():
        if name not in have:
            answer = "0" if name.startswith("Msprof") else f'unsupported("{name}")'
            print(f"long {name}(void) {{ return {answer}; }}")


if __name__ == "__main__":
    main()
