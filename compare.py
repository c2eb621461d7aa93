"""Finished runs side by side: what more LoRAs bring, what differs, how far rankings agree.

    python compare.py RESULTS RESULTS ... [--out FOLDER]

Each of RESULTS is a folder that ablation_experiment.py has written. Prints a table and sentences, and writes
comparison.json, comparison.txt, comparison.html and figures/ (see docs/compare.md). Only comparable runs are compared:
those of the same classes, layers, settings and program. Nothing is averaged over runs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `end_at_signals`; Python would show where it was interrupted

from experiment.signals import end_at_signals
from loras.command_line import Parser
from loras.names import discard_output, escape_output

NONE = "none"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; end the program with exit code 2 at a mistake."""
    parser = Parser(prog="compare.py", description="Finished runs side by side.")
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="folders of results, such as ablation-results/ablation_1k",
    )
    parser.add_argument(
        "--out",
        default="comparison",
        metavar="FOLDER",
        help="folder that the comparison is written to; an earlier one in it moves to previous/. none: it is printed "
        "only (comparison)",
    )
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Compare, print and write.

    Raises:
        UsageError: Flags cannot be used, or the folder holds something else.
        CollectionError: Results cannot be read.
    """
    from experiment import compared  # and libraries, which take seconds
    from loras.building import say
    from report import side_by_side

    target = None if args.out == NONE else compared.checked_folder(Path(args.out))
    comparison = compared.compared(args.results)
    content = side_by_side.content_of(comparison)
    lines = [side_by_side.render_text(content)]
    if target is not None:
        from report import side_by_side_figure, side_by_side_page

        drawn = side_by_side_figure.draw(comparison)
        page = side_by_side_page.render_page(content, side_by_side_figure.finding(comparison), drawn)
        lines.append(compared.write(target, comparison, lines[0], page, drawn))
    say("\n".join(lines))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return 0 done, 2 refused, 130 interrupted."""
    escape_output()
    args = parse_arguments(arguments)
    from data import CollectionError
    from experiment.settings import UsageError
    from loras.building import fault_of

    try:
        code = run(args)
        sys.stdout.flush()
    except (UsageError, CollectionError) as error:
        print(error.shown() if isinstance(error, CollectionError) else f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # what it writes to files is written before
        discard_output()
        return 0
    except OSError as error:
        print(f"error: {fault_of(error)}. Give another --out, or make room.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # where it was called by another program
        print("\nInterrupted.", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    end_at_signals("")
    sys.exit(main())
