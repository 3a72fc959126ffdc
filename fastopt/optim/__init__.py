"""The optimizers of torch.optim, class for class, each step one fused launch."""

from fastopt.optim.adadelta import Adadelta
from fastopt.optim.adagrad import Adagrad
from fastopt.optim.adam import Adam, AdamW
from fastopt.optim.adamax import Adamax
from fastopt.optim.nadam import NAdam
from fastopt.optim.optimizer import FusedOptimizer
from fastopt.optim.radam import RAdam
from fastopt.optim.rmsprop import RMSprop
from fastopt.optim.sgd import SGD
from fastopt_kernels import xp

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FusedOptimizer",
    "NAdam",
    "RAdam",
    "RMSprop",
    "xp",
]
