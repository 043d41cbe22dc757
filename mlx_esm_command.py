"""Where the command `mlx-esm` begins.

It stands beside the package, since importing anything of the package takes a while, in which Ctrl-C is no error either.
"""

import sys


def main() -> None:
    try:
        from mlx_esm_hf.cli import app

        app()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
