"""Convert weights of other programs to a file that every command takes as a checkpoint.

It reads Caffe's .caffemodel files, the same nets as .onnx, checkpoints of cuda-convnet, and state
dicts of torchvision's AlexNet and of this package.

    modelpar-convert source=bvlc_alexnet.caffemodel out=caffe.safetensors
    modelpar-convert source=[column0.pt,column1.pt] recipe=paper out=net.safetensors
"""

from functools import partial

from modelpar import command

main = partial(command.main, "convert", "interchange.imports:convert")

if __name__ == "__main__":
    main()
