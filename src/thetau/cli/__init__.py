"""The command line. Importing it loads no torch: each verb loads what it needs when it runs."""

from __future__ import annotations

import atexit
import contextlib
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
    with contextlib.suppress(BrokenPipeError):  # of a reader that has seen enough
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(argv: Sequence[str] | None) -> int:
    from thetau.cli.app import app
    from thetau.cli.progress import watcher
    from thetau.errors import ThetauError
    from thetau.pace import watched

    try:
        with watched(seen := watcher()):
            try:
                app(args=list(argv) if argv is not None else None, prog_name="thetau")
            finally:  # a bar must not stand where an error is told
                seen.end()
                seen.leave()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ThetauError as error:
        return _told(str(error))
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a disk, a right or a name: nothing of ours
        where = f"{error.filename}: " if error.filename is not None else ""
        return _told(f"{where}{error.strerror or error}.")
    except MemoryError as error:
        return _told(
            f"out of memory{f' ({error})' if str(error) else ''}. Give `--max-memory`, fewer `--workers`, or a smaller batch."
        )
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0


def _told(message: str) -> int:
    """An error in words; exit code 1."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(message, style="default"))
    return 1
