from emmech.planning.cards import Accelerator as Accelerator
from emmech.planning.plan import ResourcePlan as ResourcePlan
