from emmech.studies.spec import Piece as Piece
from emmech.studies.spec import StudySpec as StudySpec
from emmech.studies.study import StudyTable as StudyTable
from emmech.studies.study import journal as journal
