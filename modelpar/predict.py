"""Print the most likely classes of images, or write them to a page or a table.

The images are prepared as an evaluation prepares them.  It works with one process or two, under
torchrun or not, and with one view of each image or the paper's ten.

    modelpar-predict checkpoint=runs/first images=photo.jpg
    modelpar-predict checkpoint=runs/first images=[photos,'scans/*.png'] out=page.html neighbours=6
    modelpar-predict checkpoint=net.safetensors images=photos out=table.csv views=10
"""

from functools import partial

from modelpar import command

main = partial(command.main, "predict", "studies.predictions:run", "training.prediction:prepare")

if __name__ == "__main__":
    main()
