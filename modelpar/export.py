"""Write the whole net to one safetensors file, whose metadata has the recipe.

modelpar-export checkpoint=runs/first out=net.safetensors
"""

from functools import partial

from modelpar import command

main = partial(command.main, "export", "interchange.exports:export")

if __name__ == "__main__":
    main()
