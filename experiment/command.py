"""The command line of data.py: parses its flags, and only then imports what the command needs, which takes seconds."""

from __future__ import annotations

from experiment.flags import add_preflight_flags
from loras.flags import parse_arguments
from loras.names import escape_output


def main(arguments: list[str] | None = None) -> int:
    """Run ``inspect``, ``import`` or ``label``; return 0 done, 2 refused, 130 interrupted."""
    escape_output()
    args = parse_arguments(arguments, add_preflight_flags)
    if args.command == "import":
        from loras import published  # needs libraries that nothing else does

        return published.run(args)
    if args.command == "label":
        from loras import label_writing

        return label_writing.run(args)
    from experiment import preflight

    return preflight.run(args)
