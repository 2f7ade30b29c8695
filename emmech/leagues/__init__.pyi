from emmech.leagues.league import League as League
from emmech.leagues.trained import Defended as Defended
from emmech.leagues.trained import Realignment as Realignment
