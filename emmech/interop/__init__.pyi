from emmech.interop.bridges import adapter_attribution as adapter_attribution
from emmech.interop.bridges import to_nnsight as to_nnsight
from emmech.interop.bridges import to_transformer_lens as to_transformer_lens
from emmech.interop.diffing_toolkit import write_organism as write_organism
from emmech.interop.inspect_task import evaluation_of as evaluation_of
from emmech.interop.inspect_task import first_plot as first_plot
from emmech.interop.inspect_task import write_inspect_log as write_inspect_log
