"""Array operations on the fastest backend of the device. The backend is chosen in `dispatch`."""

from mlx_esm_hf.ops.dispatch import activated as activated
from mlx_esm_hf.ops.dispatch import adamw as adamw
from mlx_esm_hf.ops.dispatch import attention as attention
from mlx_esm_hf.ops.dispatch import attention_probabilities as attention_probabilities
from mlx_esm_hf.ops.dispatch import choose_layout as choose_layout
from mlx_esm_hf.ops.dispatch import compiled as compiled
from mlx_esm_hf.ops.dispatch import computing_dtype as computing_dtype
from mlx_esm_hf.ops.dispatch import gelu as gelu
from mlx_esm_hf.ops.dispatch import layer_norm as layer_norm
from mlx_esm_hf.ops.dispatch import linear as linear
from mlx_esm_hf.ops.dispatch import packs as packs
from mlx_esm_hf.ops.dispatch import quantized_linear as quantized_linear
from mlx_esm_hf.ops.dispatch import sigmoid as sigmoid
from mlx_esm_hf.ops.dispatch import sigmoid_gate as sigmoid_gate
from mlx_esm_hf.ops.dispatch import softmax as softmax
from mlx_esm_hf.ops.dispatch import sum_of_squares as sum_of_squares
from mlx_esm_hf.ops.dispatch import swiglu as swiglu
from mlx_esm_hf.ops.heads import merge_heads as merge_heads
from mlx_esm_hf.ops.heads import split_heads as split_heads
from mlx_esm_hf.ops.layout import Layout as Layout
from mlx_esm_hf.ops.windows import windowed_attention as windowed_attention
