from emmech.planning.cards import CARDS as CARDS
from emmech.planning.cards import Accelerator as Accelerator
from emmech.planning.plan import ResourcePlan as ResourcePlan
from emmech.planning.shapes import SHAPES as SHAPES
