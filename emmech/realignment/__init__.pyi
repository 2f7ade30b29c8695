from emmech.realignment.studies import Durability as Durability
from emmech.realignment.studies import LearningCurve as LearningCurve
from emmech.realignment.studies import durability as durability
from emmech.realignment.studies import learning_curve as learning_curve
