"""``python -m fcvgg``: the command line."""

from fcvgg.cli import main

if __name__ == "__main__":
    main()
