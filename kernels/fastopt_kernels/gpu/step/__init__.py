"""An optimizer's step: one launch for all tensors, and what is measured of gradients before it."""
