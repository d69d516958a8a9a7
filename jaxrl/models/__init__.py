"""Decoder, heads and log-probabilities; knows no RL."""

from jaxrl.models.cached_attention import KeyValues, LayerCache, Rows
from jaxrl.models.decoder import Decoder, DecoderConfig
from jaxrl.models.logprobs import token_logits, token_logprobs
from jaxrl.models.outputs import MODEL_SIGNALS, critic_from_policy, init_parameters, model_outputs
from jaxrl.models.outputs import unbox
