"""NSGD, Nudged SGD (Jastrzębski et al., ICLR 2019): SGD that steps less along the sharpest directions of the loss."""

from nsgd.curvature.eigen import Eigenpairs as Eigenpairs
from nsgd.curvature.eigen import top_eigenpairs as top_eigenpairs
from nsgd.directions.drawn_targets import drawn_mse_loss as drawn_mse_loss
from nsgd.directions.micro_batches import backward_in_chunks as backward_in_chunks
from nsgd.directions.samples import sample_losses as sample_losses
from nsgd.optimizer import NSGD as NSGD
from nsgd.optimizer import damp as damp

__all__ = ["NSGD", "Eigenpairs", "backward_in_chunks", "damp", "drawn_mse_loss", "sample_losses", "top_eigenpairs"]
__version__ = "0.2.0"
