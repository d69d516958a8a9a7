"""From files to tasks: sources, tokenizers, row-to-task templates and a checkpointable pipeline.

    source = open_source("train.jsonl")
    builder = TaskBuilder(tokenizer, fields=Fields(question="problem"))
    tasks = tasks_pipeline(source, builder.read, seed=0)
"""

from jaxrl.data.consensus import agreed_principles
from jaxrl.data.conversations import end_of_turn
from jaxrl.data.examples import Fields
from jaxrl.data.examples import RowCounts
from jaxrl.data.examples import supervised
from jaxrl.data.examples import TaskBuilder
from jaxrl.data.pairs import AS_IT_IS
from jaxrl.data.pairs import compared
from jaxrl.data.pairs import Comparison
from jaxrl.data.pairs import linked
from jaxrl.data.pairs import mismatched
from jaxrl.data.pairs import PairBuilder
from jaxrl.data.parts import split_steps
from jaxrl.data.parts import STEP_LABELS
from jaxrl.data.parts import stepwise
from jaxrl.data.pipeline import TaskIterator
from jaxrl.data.pipeline import tasks_pipeline
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import open_source
from jaxrl.data.sources import Source
from jaxrl.data.tokenizers import CharacterTokenizer
from jaxrl.data.tokenizers import load_tokenizer
from jaxrl.data.tokenizers import PretrainedTokenizer
from jaxrl.data.tokenizers import set_date
from jaxrl.data.tokenizers import Tokenizer
from jaxrl.data.tokenizers import train_bpe
