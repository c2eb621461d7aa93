"""Predict the concept of LoRAs that an experiment never saw, by the classifiers that it has kept beside its results.

    python predict.py ablation-results/ablation_1k new-lora.safetensors other-loras/

docs/predict.md says what the numbers mean.
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
from loras.names import discard_output, escape_output, one_line, plain, spreadsheet_cell


def given(text: str) -> Path:
    """Return a path of the command line; an empty one would be the current folder.

    Raises:
        argparse.ArgumentTypeError: It is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path. Give a file or a folder.")
    return Path(text)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the command line."""
    parser = Parser(
        usage="%(prog)s RESULTS FILE_OR_FOLDER ... [flags]",
        description="Predict the concept of new LoRAs, by the classifiers that an experiment has kept in model/.",
    )
    add = parser.add_argument
    add("results", type=given, metavar="RESULTS", help="folder of the results of an experiment, or its model/ alone")
    add("paths", type=given, nargs="+", metavar="FILE_OR_FOLDER", help="LoRAs, of a training's checkpoints the last")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON, with the probabilities of all classes")
    how.add_argument("--csv", action="store_true", help="print csv")
    add("--representation", metavar="NAME", help="one of those that were kept (the best by validation)")
    add("--missing", choices=("zero",), help="take modules that a file lacks as no update (the file is refused)")
    add("--extra", choices=("ignore",), help="pass over modules that no training LoRA had (the file is refused)")
    add("--skip-bad", action="store_true", help="leave out files that cannot be predicted (all are refused)")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds: how to end, --help, and what is mistyped
    escape_output()
    end_at_signals("")
    parse_arguments(sys.argv[1:])

from data import CollectionError
from experiment.model_files import ModelFolder
from experiment.prediction import Choices, chosen_record, predict_files
from experiment.settings import UsageError
from experiment.units import OutOfMemory, one_memory_error
from loras.building import fault_of
from report import predicted


def run(args: argparse.Namespace) -> None:
    """Predict, and print what is predicted.

    Raises:
        CollectionError: The model or the files cannot be used.
        UsageError: A flag cannot be used.
    """
    model = ModelFolder(args.results)
    record = chosen_record(model, args.representation)
    for note in model.notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    choices = Choices(args.missing or "refuse", args.extra or "refuse")
    files, skipped = predict_files(model, record, args.paths, choices, args.skip_bad)
    classes = model.manifest["classes"]
    if args.json:
        print(predicted.as_json(record, classes, files, skipped))
        return
    if args.csv:
        print(predicted.as_csv(files, lambda text: spreadsheet_cell(plain(text))))
        for left_out in skipped:
            print(plain(f"left out: {left_out['file']}: {left_out['reason']}"), file=sys.stderr)
        return
    print(one_line(predicted.heading(record, classes, model.manifest["dataset"]["name"])))
    print("\n".join(map(plain, predicted.table(files, skipped).split("\n"))))


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return 0 done, 2 refused, 130 interrupted."""
    escape_output()
    args = parse_arguments(arguments)
    try:
        with one_memory_error():
            run(args)
        sys.stdout.flush()
    except (UsageError, CollectionError) as error:
        print(error.shown() if isinstance(error, CollectionError) else f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        discard_output()
    except OSError as error:
        print(f"error: {plain(fault_of(error))}. Mend that, and start again.", file=sys.stderr)
        return 2
    except OutOfMemory as error:
        print(f"error: out of memory: {plain(str(error))}. Predict fewer files at a time.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # where it was called by another program
        print("\nInterrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
