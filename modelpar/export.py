"""Write the whole net to one file for other programs, and a model card beside it.

A .safetensors file holds the weights, with all that a command needs to use them; .onnx and .pt2
files hold the net from pixels to logits.

modelpar-export checkpoint=runs/first out=net.safetensors
"""

from functools import partial

from modelpar import command

main = partial(command.main, "export", "interchange.exports:export")

if __name__ == "__main__":
    main()
