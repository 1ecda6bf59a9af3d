from .effective_field import EffectiveReceptiveField as EffectiveReceptiveField
from .effective_field import effective_receptive_field as effective_receptive_field
from .layer_table import LayerTable as LayerTable
from .layer_table import receptive_fields as receptive_fields
from .protocols import Evaluation as Evaluation
from .protocols import evaluate as evaluate
from .window_comparison import WindowComparison as WindowComparison
from .window_comparison import compare_windows as compare_windows
