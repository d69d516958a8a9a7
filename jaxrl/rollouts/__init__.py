"""Episodes and the loop that runs them."""

from jaxrl.rollouts.branching import answers_to_thoughts
from jaxrl.rollouts.caps import capped_group
from jaxrl.rollouts.collect import Collected
from jaxrl.rollouts.collect import collect
from jaxrl.rollouts.corrections import recombined_corrections
from jaxrl.rollouts.documents import predict_segments
from jaxrl.rollouts.engine import EpisodeContext
from jaxrl.rollouts.engine import EpisodeFailure
from jaxrl.rollouts.engine import Rollouts
from jaxrl.rollouts.episodes import group
from jaxrl.rollouts.influence import influence_rewarded
from jaxrl.rollouts.injection import best_and_flawed
from jaxrl.rollouts.interventions import repaired_trace
from jaxrl.rollouts.midtraining import predict_tokens
from jaxrl.rollouts.experts import group_and_expert
from jaxrl.rollouts.modes import answer_in_mode
from jaxrl.rollouts.outlines import outlines_then_paths
from jaxrl.rollouts.planning import execute_distinct_plans
from jaxrl.rollouts.planning import plan_then_execute
from jaxrl.rollouts.refinement import draft_then_refine
from jaxrl.rollouts.rewriting import rewrite_and_answer
from jaxrl.rollouts.rounds import summarised_rounds
from jaxrl.rollouts.self_verification import answer_or_verify
from jaxrl.rollouts.transfer import transferable_answers
from jaxrl.rollouts.world_models import explain_transitions
from jaxrl.rollouts.world_models import imagine_next_states
