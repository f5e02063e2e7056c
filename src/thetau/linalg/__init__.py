"""Decompositions and solvers that methods share: one file a subject.

- `rounding`: what is below the rounding of its own inputs, and is therefore zero: residuals, and spectra of Gram matrices.
- `gram`: Gram matrices, and the part of them that is no rounding.
- `svd`, `sketch`: singular values and vectors, whole or by a random sketch.
- `kronecker`: sums of Kronecker products as operators.
- `descent`: conjugate gradients and gradient flow, by the operator alone.

They take and give tensors, and know no method, no file and no engine.
"""
