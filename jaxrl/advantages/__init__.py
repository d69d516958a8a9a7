"""Credit: the names that `config.advantage` may list, each `(batch, values, *, ...) -> values`.

`jaxrl.advantages.chain` runs a list of them.
"""

from jaxrl.advantages.baselines import center_by_batch
from jaxrl.advantages.baselines import center_by_group
from jaxrl.advantages.baselines import leave_one_out
from jaxrl.advantages.certainty import weigh_by_certainty
from jaxrl.advantages.confidence_targets import target_confidence
from jaxrl.advantages.constraints import constrain_divergence
from jaxrl.advantages.contrast import contrast_halves
from jaxrl.advantages.corrections import mask_disagreement
from jaxrl.advantages.corrections import penalise_centred_kl
from jaxrl.advantages.corrections import penalise_kl
from jaxrl.advantages.corrections import truncate_importance
from jaxrl.advantages.entropy_anchor import anchor_entropy
from jaxrl.advantages.entropy_modulation import modulate_by_entropy
from jaxrl.advantages.hidden_rank import favour_hidden_rank
from jaxrl.advantages.inverse import inverse_rewards
from jaxrl.advantages.modes import compare_modes
from jaxrl.advantages.modes import favour_direct_mode
from jaxrl.advantages.risk import risk_seeking
from jaxrl.advantages.scales import scale_by_batch_std
from jaxrl.advantages.scales import scale_by_group_std
from jaxrl.advantages.scales import whiten_tokens
from jaxrl.advantages.segments import weigh_plans
from jaxrl.advantages.self_scoring import score_by_confidence
from jaxrl.advantages.stored import stored_advantages
from jaxrl.advantages.values import gae
from jaxrl.advantages.verdicts import weigh_verdicts
