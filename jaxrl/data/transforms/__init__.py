"""What is done to rows before anything else reads them: `config.data.transforms`, in their order.

A transform is `(source, *, ...) -> Source`. It keeps random access: what a row becomes depends on its
index, the seed and the source alone, so a run continues to the same rows. One that has an argument `seed`
gets that of the run for training data and 0 for others, unless the config gives one; one with an argument
`split` gets "train", "validation" or "test". In a config a transform may also say which splits it is
for: `dict(name="demonstrations", k=8, splits=("train",))`.
"""

from jaxrl.data.transforms.answers import group_rows
from jaxrl.data.transforms.answers import labelled_solutions
from jaxrl.data.transforms.answers import pair_answers
from jaxrl.data.transforms.answers import rank_answers
from jaxrl.data.transforms.answers import votes
from jaxrl.data.transforms.cleaning import clean
from jaxrl.data.transforms.cleaning import flip_labels
from jaxrl.data.transforms.cleaning import leave_part_out
from jaxrl.data.transforms.demonstrations import demonstrations
from jaxrl.data.transforms.pairs_of_pairs import pairs_of_pairs
from jaxrl.data.transforms.references import policy_pairs
from jaxrl.data.transforms.references import ranked_triples
from jaxrl.data.transforms.splits import hold_out
