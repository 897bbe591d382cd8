"""`with no_init_weights():` constructs models without drawing their weights."""

from forgather.models.undrawn import no_init_weights

__all__ = ["no_init_weights"]
