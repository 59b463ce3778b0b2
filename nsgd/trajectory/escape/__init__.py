"""How SGD leaves a minimum: what the diffusion predicts, potentials to try it on, and walkers that run it."""

from nsgd.trajectory.escape.diffusion import energy_factor as energy_factor
from nsgd.trajectory.escape.diffusion import escape_time as escape_time
from nsgd.trajectory.escape.diffusion import excess_loss as excess_loss
from nsgd.trajectory.escape.diffusion import gibbs_mass as gibbs_mass
from nsgd.trajectory.escape.diffusion import gibbs_mean as gibbs_mean
from nsgd.trajectory.escape.diffusion import inertia as inertia
from nsgd.trajectory.escape.diffusion import kramers_factor as kramers_factor
from nsgd.trajectory.escape.diffusion import laplace_mass as laplace_mass
from nsgd.trajectory.escape.diffusion import passage_time as passage_time
from nsgd.trajectory.escape.diffusion import temperature as temperature
from nsgd.trajectory.escape.walkers import Escapes as Escapes
from nsgd.trajectory.escape.walkers import simulate as simulate
