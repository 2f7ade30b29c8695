from emmech.sweeps.probe import ProbeActivation as ProbeActivation
from emmech.sweeps.sampled import Sampled as Sampled
from emmech.sweeps.tangent import TangentScan as TangentScan
from emmech.sweeps.tangent import tangent_scan as tangent_scan
