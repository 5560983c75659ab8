# Types of the names that __init__.py imports when first used.
from sinterlm.engine.llm import LLM as LLM
from sinterlm.engine.outputs import CompletionOutput as CompletionOutput
from sinterlm.engine.outputs import RequestOutput as RequestOutput
from sinterlm.engine.sampling import SamplingParams as SamplingParams

__version__: str
