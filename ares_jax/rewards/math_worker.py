"""The process behind `ares_jax.rewards.verifier`: reads [given, wanted, tolerance] a line, answers true or false.

It runs as a script, not as part of the package, so that it loads sympy and nothing else. The kernel ends it when one pair
takes too long: an interpreter inside a long integer power hears no signal handler.
"""

import json
import logging
import resource
import signal
import sys


def main(cpu_seconds: float, memory_bytes: int) -> None:
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    def near(gold: list, target: list, tolerance: float) -> bool:
        """Says whether both are numbers, however they are written, and so near to each other."""
        numbers = [item for side in (gold, target) for item in side[:1] if isinstance(item, Expr) and not item.free_symbols]
        return len(numbers) == 2 and bool(abs((numbers[0] - numbers[1]).evalf()) <= tolerance)

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    latex = [LatexExtractionConfig()]  # not the rule that finds a number anywhere in a sentence
    sys.set_int_max_str_digits(100_000)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a process that loaded libtpu ignores it, and its children inherit that
    answers = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        given, wanted, tolerance = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # of this process's own time: a busy machine changes no verdict
        try:
            gold, target = (parse(f"${text}$", latex, parsing_timeout=None) for text in (wanted, given))
            same = bool(verify(gold, target, timeout_seconds=None, allow_set_relation_comp=True))
            same = same or (tolerance > 0 and near(gold, target, tolerance))
        except (Exception, RecursionError, MemoryError):
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(same), file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
