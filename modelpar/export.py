"""The whole net as one file: ``python -m modelpar.export checkpoint=RUN_DIR out=FILE``."""

from functools import partial

from modelpar import command

main = partial(command.main, "export", "interchange.exports:export")

if __name__ == "__main__":
    main()
