"""From tasks to device batches: `Task` (host) -> `Trajectory` (host) -> `TokenBatch` (device).

Every per-token array is indexed by the token it is *about*: `behaviour_logprobs[t]` and
`loss_mask[t]` speak of `tokens[t]`, and so does every log-probability a model returns. Nothing else
in jaxrl shifts by one.
"""

from jaxrl.batch.packing import Layout, bucket, first_fit_decreasing, pack, prompt_length, shared_length
from jaxrl.batch.packing import unpack
from jaxrl.batch.segments import as_one_group, at_last_tokens, column_of, count_by_group
from jaxrl.batch.segments import deviation_by_group, max_by_group, mean_by_group, mean_by_sequence
from jaxrl.batch.segments import min_by_group, std_by_group, sum_by_group, sum_by_sequence, to_tokens
from jaxrl.batch.token_batch import BY_ROWS, CRITIQUE, PADDING, PER_TOKEN, PREFERENCE, STRONGER, TUPLE
from jaxrl.batch.token_batch import ModelOutputs, Task, TokenBatch, Trajectory
