"""Drop-in replacement of torch.nn's RNN, LSTM and GRU on fused engines."""

from fastrnn import functional as functional
from fastrnn import tracers as _tracers  # noqa: F401  # for what it does to torch
from fastrnn.cells import cell as cell
from fastrnn.checkpoint import recompute as recompute
from fastrnn.convert import compress as compress
from fastrnn.convert import convert as convert
from fastrnn.convert import patch as patch
from fastrnn.convert import revert as revert
from fastrnn.dispatch import explain as explain
from fastrnn.frozen import freeze as freeze
from fastrnn.frozen import thaw as thaw
from fastrnn.modules import GRU as GRU
from fastrnn.modules import LSTM as LSTM
from fastrnn.modules import RNN as RNN
from fastrnn.modules import GRUCell as GRUCell
from fastrnn.modules import LSTMCell as LSTMCell
from fastrnn.modules import RNNCell as RNNCell
from fastrnn.recurrent import recurrent as recurrent

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "cell",
    "compress",
    "convert",
    "explain",
    "freeze",
    "functional",
    "patch",
    "recompute",
    "recurrent",
    "revert",
    "thaw",
]
__version__ = "0.1.0"
