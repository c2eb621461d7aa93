"""The command line of data.py: parses its flags, and only then imports what the command needs, which takes seconds."""

from __future__ import annotations

import argparse
import sys

from experiment.flags import add_preflight_flags
from experiment.signals import CONTINUES, end_at_signals
from loras.flags import parse_arguments
from loras.names import discard_output, escape_output


def run_as_program() -> int:
    """Run `main` as a program: a signal ends it within a second, with a line and a code of its own, not a traceback."""
    escape_output()
    end_at_signals(CONTINUES if sys.argv[1:2] == ["import"] else "")
    return main()


def main(arguments: list[str] | None = None) -> int:
    """Run ``inspect``, ``import`` or ``label``; return 0 done, 2 refused, 130 interrupted."""
    escape_output()
    args = parse_arguments(arguments, add_preflight_flags)
    try:
        code = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # what it writes to files is written before
        discard_output()
        return 0
    except KeyboardInterrupt:  # where it was called by another program
        print("\nInterrupted.", file=sys.stderr)
        return 130
    return code


def _run(args: argparse.Namespace) -> int:
    if args.command == "import":
        from loras import published  # needs libraries that nothing else does

        return published.run(args)
    if args.command == "label":
        from loras import label_writing

        return label_writing.run(args)
    from experiment import preflight

    return preflight.run(args)
