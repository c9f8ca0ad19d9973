"""A process that compares answers as mathematics: a JSON line [expected, response] in, a line out.

It says true, false, or null where `expected` is no mathematics. It is run as a script by
answers.MathJudge, which ends it where it takes too long.
"""

import json
import logging
import os
import sys
import threading
import time
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

MARKS = ("$", r"\boxed", r"\(", r"\[")  # what math-verify finds formulas by


@lru_cache(maxsize=4096)
def known(expected: str) -> Any:
    """The answer of a row; the whole of it is one formula, whether or not it is marked as such."""
    marked = expected if any(mark in expected for mark in MARKS) else f"${expected}$"
    try:
        return parse(marked, parsing_timeout=None)
    except Exception:  # sympy raises many kinds over what people may write
        return []


def equal(expected: str, response: str) -> bool | None:
    """Whether both answers are equal; None where the expected one cannot be read."""
    if not (answer := known(expected)):
        return None
    try:
        given = parse(response, parsing_timeout=None)
        return bool(verify(answer, given, timeout_seconds=None))
    except Exception:
        return False


def end_with(parent: int) -> None:
    """End where the parent has died while an answer takes for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    logging.disable()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), flush=True)
