"""Entry point of `mlx-esm` and `python -m mlx_esm_hf`."""

import sys


def main() -> None:
    """Run the command line, with Ctrl-C handled from the first import on."""
    try:
        from mlx_esm_hf.cli import app

        app(prog_name="mlx-esm")
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
