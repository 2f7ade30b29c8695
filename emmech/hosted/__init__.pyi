from emmech.hosted.cost import Cost as Cost
from emmech.hosted.cost import estimate as estimate
from emmech.hosted.job import HostedJob as HostedJob
from emmech.hosted.job import cancel as cancel
from emmech.hosted.job import finetune as finetune
