from emmech.ledger.bench import Bench as Bench
from emmech.ledger.claim import Claim as Claim
from emmech.ledger.claim import Finding as Finding
from emmech.ledger.claim import NotMeasurable as NotMeasurable
from emmech.ledger.claim import Rule as Rule
from emmech.ledger.claim import over_seeds as over_seeds
from emmech.ledger.ledger import Ledger as Ledger
