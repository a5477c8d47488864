"""The most likely classes of images: ``modelpar-predict checkpoint=RUN_DIR images=[FILE,FOLDER]``.

With one process or two, under torchrun or not, with one view or the paper's ten.
"""

from functools import partial

from modelpar import command

main = partial(command.main, "predict", "studies.predictions:run", "training.prediction:prepare")

if __name__ == "__main__":
    main()
