"""The names of parameters."""

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name in the model as it was written, without what compile and recompute add.

    By it a parameter is drawn, saved and exported, so that none of these depends on how the model is run.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
