"""The parts of a causal LM, their sizes, and the layers that can carry a graft.

Everything is found by inspection of the model, real or on the meta device: its modules, the
signature and source of its layers, and two probes that run a layer and the head with stand-ins in
place of their parts. Nothing here is a table of models.
"""

from mmgraft.anatomy.blocked import keeps_keys as keeps_keys
from mmgraft.anatomy.description import Anatomy as Anatomy
from mmgraft.anatomy.description import decoder_layers as decoder_layers
from mmgraft.anatomy.description import get_path as get_path
from mmgraft.anatomy.inspection import examine as examine
from mmgraft.anatomy.inspection import examine_config as examine_config
from mmgraft.anatomy.inspection import refuse_non_causal as refuse_non_causal
from mmgraft.anatomy.inspection import skeleton as skeleton
from mmgraft.anatomy.inspection import text_config as text_config
from mmgraft.anatomy.shrinking import shrunken as shrunken
