"""Turn a trained VGG-kind classifier into the equivalent fully convolutional network."""

from fcvgg.conversion import convert
from fcvgg.errors import FcvggError
from fcvgg.geometry import Geometry
from fcvgg.heatmap import Heatmap
from fcvgg.network import FullyConvolutional
from fcvgg.preprocessing import Preprocess
from fcvgg.score_map import ScoreMap
from fcvgg.verification import Equivalence, verify

__version__ = "0.1.0"
