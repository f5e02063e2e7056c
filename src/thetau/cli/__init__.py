"""The command line. Importing it loads no torch: each verb loads what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; thetau's own errors end in one message and exit code 1."""
    from thetau.cli.app import app
    from thetau.errors import ThetauError

    try:
        app(args=list(argv) if argv is not None else None, prog_name="thetau")
    except ThetauError as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(str(error), style="default"))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
