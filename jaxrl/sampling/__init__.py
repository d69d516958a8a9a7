"""Generation: prompts are read once each and shared by all their samples."""

from jaxrl.sampling.draw import Distribution, draw_tokens
from jaxrl.sampling.likelihood import Likelihood
from jaxrl.sampling.requests import Request, Sample, SamplingParams
from jaxrl.sampling.sampler import Sampler, Statistics
