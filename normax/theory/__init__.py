"""The theory of batch normalization as functions: what its noise is, does and costs, in numbers."""

from normax.theory.decay import GammaDecayState as GammaDecayState
from normax.theory.decay import gamma_decay as gamma_decay
from normax.theory.linear import batch_norm_error as batch_norm_error
from normax.theory.linear import least_squares_error as least_squares_error
from normax.theory.linear import resolvent_trace as resolvent_trace
from normax.theory.linear import ridge_error as ridge_error
from normax.theory.linear import ridge_of_decay as ridge_of_decay
from normax.theory.noise import DeviationLaw as DeviationLaw
from normax.theory.noise import approximate_noise as approximate_noise
from normax.theory.noise import batch_noise as batch_noise
from normax.theory.noise import deviation_law as deviation_law
from normax.theory.noise import expected_deviation as expected_deviation
from normax.theory.noise import finite_population as finite_population
from normax.theory.regularizer import Coefficient as Coefficient
from normax.theory.regularizer import decay_coefficient as decay_coefficient
from normax.theory.regularizer import first_order_gap as first_order_gap
from normax.theory.regularizer import loss_derivatives as loss_derivatives
from normax.theory.shape import excess_kurtosis as excess_kurtosis
from normax.theory.shape import skewness as skewness
