"""`python -m engines NAME ...`: start one of the engines in this process."""

from __future__ import annotations

import sys

from engines.process import EXIT_USAGE

USAGE = """\
usage: python -m engines NAME [options]

Workloads for hosts without a real engine. They hold real device memory through the CUDA driver that the loader finds,
so that they run on the software GPU as well as on a real one.

  simulated   OpenAI-compatible server with modelled speed, KV memory and vLLM's sleep mode
  training    holds memory, steps, writes checkpoints, resumes; yields its GPU without losing a step

`python -m engines NAME --help` lists the options of one.
"""


def main(arguments: list[str]) -> int:
    """The exit code of the chosen engine."""
    name = arguments[0] if arguments else "--help"
    if name in {"-h", "--help"}:
        sys.stdout.write(USAGE)
        return 0
    # Late imports: one engine does not pay for the other.
    if name == "simulated":
        from engines.simulated.command import main as run_simulated

        return run_simulated(arguments[1:])
    if name == "training":
        from engines.training.command import main as run_training

        return run_training(arguments[1:])
    sys.stderr.write(f"python -m engines: There is no engine {name!r}: choose simulated or training.\n")
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
