"""`python -m pyops`: the command line."""

from pyops.cli import main

if __name__ == "__main__":
    main()
