"""A data set prepared once: ``python -m modelpar.prepare data=... data.root=ROOT out=DIR``."""

from functools import partial

from modelpar import command

main = partial(command.main, "prepare", "images.packing:prepare")

if __name__ == "__main__":
    main()
