"""Decode, scale and cut the images of a data set once, into a store that ``data=packed`` reads.

After a stop the same command continues.

    modelpar-prepare data=imagenet data.root=/data/imagenet out=packed
    modelpar-prepare data=imagefolder data.root=/data/flowers out=flowers format=raw
"""

from functools import partial

from modelpar import command

main = partial(command.main, "prepare", "images.packing:prepare")

if __name__ == "__main__":
    main()
