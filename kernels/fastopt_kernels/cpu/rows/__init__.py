"""softmax, losses and norms: reductions along rows, columns and channels."""
