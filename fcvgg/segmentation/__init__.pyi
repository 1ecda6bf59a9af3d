from .mask_folders import MaskFolder as MaskFolder
from .mask_folders import mask_folder as mask_folder
from .metrics import SegmentationMetrics as SegmentationMetrics
from .metrics import label_metrics as label_metrics
from .network import FCN as FCN
from .training import DenseTraining as DenseTraining
from .training import evaluate_fcn as evaluate_fcn
from .training import train_fcn as train_fcn
