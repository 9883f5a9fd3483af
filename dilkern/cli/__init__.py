"""The command line: `dilkern train`, `dilkern report`, `dilkern plan`, `dilkern doctor`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from dilkern import __version__
from dilkern.cli.help import HELP
from dilkern.validation import nearest, raised_by_check, reject

# What `pip install 'dilkern[train]'` brings.
_EXTRAS = ("transformers", "trl", "peft", "accelerate", "datasets", "matplotlib", "yaml", "tqdm")


@contextlib.contextmanager
def library_talk_kept_back() -> Iterator[None]:
    """Keep back what libraries say of their own names and kernels, which nobody here can mend."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", ".*(save_embedding_layers|pin_memory)", UserWarning)
        yield


def _run(words: list[str]) -> None:
    command = words[0] if words else "--help"
    if command in ("--help", "-h", "help"):
        print(HELP["dilkern"])
    elif command in ("--version", "-V"):
        print(f"dilkern {__version__}")
    elif command not in HELP or command == "dilkern":
        near = nearest(command, HELP)
        reject(
            "the command must be train, report, plan or doctor",
            repr(command),
            f"Did you mean {near!r}?" if near else "See dilkern --help.",
        )
    elif {"--help", "-h"} & set(words):
        print(HELP[command])
    else:
        with library_talk_kept_back():
            # Imported here, because the trainer's libraries take seconds.
            importlib.import_module(f"dilkern.cli.{command}").run(words[1:])


def main(words: list[str] | None = None) -> None:
    """Run the command line; a failed check prints its message, anything else its traceback.

    Args:
        words: the command and its options; those of the process by default.
    """
    try:
        _run(sys.argv[1:] if words is None else words)
    except ValueError as error:
        if not raised_by_check(error):
            raise
        sys.exit(_failed(str(error)))
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        sys.exit(_failed(f"this command needs {package}: pip install 'dilkern[train]'"))
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
