"""What goes on in a model as it trains: its layers' statistics and gradients, its loss's shape."""

from normax.diagnostics.decay import decay_coefficients as decay_coefficients
from normax.diagnostics.decay import measured_decay as measured_decay
from normax.diagnostics.landscape import Smoothness as Smoothness
from normax.diagnostics.landscape import Spectrum as Spectrum
from normax.diagnostics.landscape import gradient_smoothness as gradient_smoothness
from normax.diagnostics.landscape import hessian_spectrum as hessian_spectrum
from normax.diagnostics.landscape import largest_learning_rate as largest_learning_rate
from normax.diagnostics.landscape import objective as objective
from normax.diagnostics.layers import GradientNorms as GradientNorms
from normax.diagnostics.layers import LayerStatistics as LayerStatistics
from normax.diagnostics.layers import Shift as Shift
from normax.diagnostics.layers import activation_shift as activation_shift
from normax.diagnostics.layers import gradient_norms as gradient_norms
from normax.diagnostics.layers import layer_statistics as layer_statistics
