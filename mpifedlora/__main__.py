"""Run the command line as `python -m mpifedlora`."""

from mpifedlora.cli.main import entry

if __name__ == "__main__":
    entry()
