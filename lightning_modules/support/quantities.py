"""Names of what is measured along a training path: callbacks write them into CSV files, and reports read them there."""

from __future__ import annotations

# -- measurements: also the stems of their files ---------------------------------------------------------------------

SHARPNESS = "sharpness"
VALLEY = "valley"
QUADRATIC = "quadratic"
AVERAGING = "averaging"
MEASUREMENTS = (SHARPNESS, VALLEY, QUADRATIC, AVERAGING)

# -- quantities of several measurements ------------------------------------------------------------------------------

LR = "lr"
LOSS = "loss"

# -- where a run of a study ended, and was best ----------------------------------------------------------------------

FROBENIUS = "frobenius"
LAMBDA_1 = "lambda_1"
DISTANCE = "distance"

# -- sharpness -------------------------------------------------------------------------------------------------------

PARAMETERS = "parameters"
EVALUATION_SAMPLES = "evaluation samples"
EIGENVALUE = "eigenvalue"
RESIDUAL = "residual"
ROOT_SUM_SQUARE = "root-sum-square"
FELT_SHARPNESS = "felt sharpness"
BATCH_SHARPNESS = "batch sharpness"
STABILITY_LIMIT = "stability limit"
DAMPED_STABILITY_LIMIT = "damped stability limit"
ALIGNMENT = "alignment"
FULL_ALIGNMENT = "alignment of the full gradient"
CHANGE = "change after a step"
BEST_MULTIPLE = "predicted best multiple"
CROSS_SECTION = "cross-section"

# What these are of, beside eigenvectors:
BASIS = "basis"
FULL_GRADIENT = "full gradient"
RANDOM = "random"
WHOLE_STEP = "whole step"


def eigenvector(number: int) -> str:
    """The name of an eigenvector, e1 for the one of the top eigenvalue."""
    return f"e{number}"


# -- valley ----------------------------------------------------------------------------------------------------------

POSITION = "position"
FLOOR = "floor"
GRID_POSITION = "grid position"
GRID_FLOOR = "grid floor"
HEIGHT = "height"
BARRIER = "barrier"
PREDICTED_POSITION = "predicted position"
PREDICTED_HEIGHT = "predicted height"
COSINE = "cosine"
DISTANCE = "distance"
FLOOR_BARRIER = "floor barrier"

# -- quadratic -------------------------------------------------------------------------------------------------------

SQUARED_GRADIENT = "squared gradient"
CURVATURE = "curvature"
BEST_RATE = "best rate"
PREDICTED_LOSS = "predicted loss"
R_SQUARED = "R^2"

# What losses are of:
OWN = "own"  # the batch whose gradient the step takes
HELD_OUT = "held out"  # a batch that the step has not seen
FIXED = "fixed"  # a batch that is the same all along the path

# -- averaging -------------------------------------------------------------------------------------------------------

TWO_POINT_GAIN = "two-point gain"
PREDICTED_TWO_POINT_GAIN = "predicted two-point gain"
SQUARED_DISTANCE = "squared distance"

# What these are of:
START = "start"
LAST = "last"
EMA = "EMA"
SWA = "SWA"
TWO_POINTS = "two points"
WHOLE = "whole run"
WINDOW = "window"  # the mean of so many last iterates
SPACING = "spacing"  # the mean of two points so many steps apart
REST = "rest"  # of the directions, beyond the sharpest


def schedule_of(average: str) -> str:
    """The name of the run under the schedule that an average equals."""
    return f"{average}, schedule"
