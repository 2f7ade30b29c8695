from emmech.measures.items import AnswerMeasure as AnswerMeasure
from emmech.measures.items import MarginMeasure as MarginMeasure
from emmech.measures.teacher_forced import AnswerLogprob as AnswerLogprob
from emmech.measures.teacher_forced import FirstToken as FirstToken
from emmech.measures.teacher_forced import Margin as Margin
from emmech.measures.teacher_forced import NextToken as NextToken
