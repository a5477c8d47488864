"""Train AlexNet, split over two processes, or continue the training found in ``run_dir``.

Without settings it trains for two minutes on photographs that come with scikit-image.  Under
torchrun each process is a rank; otherwise the command starts the ranks itself.

    modelpar-train run_dir=runs/first
    modelpar-train data=imagenet data.root=/data/imagenet run_dir=runs/imagenet
    modelpar-train recipe=clean recipe.lr=0.005 epochs=6 run_dir=runs/slow_rate
    modelpar-train -m experiment=two_columns,no_lrn seed=0,1,2 run_dir=runs/lrn
    torchrun --standalone --nproc-per-node 4 -m modelpar.train run_dir=runs/four
"""

from functools import partial

from modelpar import command

main = partial(command.main, "train", "training.runner:train", "training.prepare:prepare")

if __name__ == "__main__":
    main()
