"""What is done to gradients and updates: the transformations that `config.optimizer.transforms` lists.

A piece is a function of keywords alone that returns an `optax.GradientTransformation`. Its keyword
`on` says where in the chain it stands: "gradient", before clipping, or "update", after the optimiser,
where what it promises of the step holds for the parameters themselves. Its state is part of the
optimiser's, so checkpoints and meshes know of it; arrays shaped like parameters are sharded like them.

What a piece may ask for beside gradient, state and parameters:

  gradient_of    an extra argument of its update, `gradient_of(loss, batch)`: the gradient at the
                 current parameters of a loss of its own. Losses and batches are what a list
                 `references` among its keywords describes, see `project_out_references`.
  begins         a function that it declares with `jaxrl.compose.begins`: run once before the first
                 update of the phase, on the host, with a `transforms.start.PhaseStart`.
"""

from jaxrl.transforms.null_space import project_onto_null_space
from jaxrl.transforms.references import project_out_references
