from emmech.sweeps.tangent import TangentScan as TangentScan
from emmech.sweeps.tangent import tangent_scan as tangent_scan
from emmech.sweeps.thresholds import threshold_robustness as threshold_robustness
