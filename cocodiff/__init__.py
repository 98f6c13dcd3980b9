"""cocodiff: distributed inference of diffusion transformers. One line makes a diffusers pipeline run over many ranks.

    pipe = cocodiff.wrap(FluxPipeline.from_pretrained(...))

Start the script with `mpiexec` or `torchrun`. Importing does no work: no environment is read, no device asked, and
neither diffusers nor a process group is touched before `wrap` is called.
"""

from cocodiff.config import Config, Selective
from cocodiff.errors import CocodiffError
from cocodiff.models.small import tiny_pipeline
from cocodiff.topology import Cluster, Level
from cocodiff.wrap import unwrap, wrap

__version__ = "0.1.0"
__all__ = ["Cluster", "CocodiffError", "Config", "Level", "Selective", "tiny_pipeline", "unwrap", "wrap"]
