"""The configuration language: YAML files that inherit from one another, and the objects they name.

    YAML files --read--> located data --merge--> one tree --resolve--> node graph --build--> objects
                                                                            |
                                                                            +------emit--> Python source

`forgather.Project` is what most users need; the stages can be used alone. Nothing here imports torch.
"""
