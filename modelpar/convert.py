"""Weights of another program as one of our files: ``modelpar-convert source=FILE out=FILE``."""

from functools import partial

from modelpar import command

main = partial(command.main, "convert", "interchange.imports:convert")

if __name__ == "__main__":
    main()
