"""`python -m htcompress_cli`: the command line, for launchers that start modules."""

from htcompress_cli.main import run

if __name__ == "__main__":
    run()
