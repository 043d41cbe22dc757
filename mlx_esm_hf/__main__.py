"""Entry point of `mlx-esm` and `python -m mlx_esm_hf`."""

import signal
import sys

from mlx_esm_hf.errors import Terminated


def main() -> None:
    """Run the command line, with Ctrl-C handled from the first import on."""
    try:
        from mlx_esm_hf.cli import app
        from mlx_esm_hf.cli.running import is_other_rank, reporting_errors
        from mlx_esm_hf.cli.streams import standard_streams

        with reporting_errors(), standard_streams():
            is_other_rank()  # connects the ranks, where a signal handler would not run
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, terminate)
            app(prog_name="mlx-esm")
    except KeyboardInterrupt:  # while importing
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # while Python exits, it runs no handlers


def terminate(*_: object) -> None:
    """Stop at SIGTERM as at Ctrl-C."""
    raise Terminated


if __name__ == "__main__":
    main()
