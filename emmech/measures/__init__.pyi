from emmech.measures.measure import Items as Items
from emmech.measures.probe import ProbeActivation as ProbeActivation
from emmech.measures.sampled import Sampled as Sampled
from emmech.measures.teacher_forced import AlignedLoss as AlignedLoss
from emmech.measures.teacher_forced import AnswerLogprob as AnswerLogprob
from emmech.measures.teacher_forced import FirstToken as FirstToken
from emmech.measures.teacher_forced import Margin as Margin
from emmech.measures.teacher_forced import NextToken as NextToken
