"""The command line. Importing it loads no torch: each verb loads what it needs when it runs."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; thetau's own errors end in one message and exit code 1."""
    code = _run(argv)
    if argv is not None:
        sys.exit(code)
    # The process ends here: taking torch's modules apart one by one would take a third of a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(argv: Sequence[str] | None) -> int:
    from thetau.cli.app import app
    from thetau.errors import ThetauError

    try:
        app(args=list(argv) if argv is not None else None, prog_name="thetau")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ThetauError as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(str(error), style="default"))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0
