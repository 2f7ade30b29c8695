from emmech.engine.logprobs import answer_logprobs as answer_logprobs
from emmech.engine.logprobs import bundled_margins as bundled_margins
from emmech.engine.sample import Drawn as Drawn
