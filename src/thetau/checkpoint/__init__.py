"""Reading and writing weights: safetensors, shards, LoRA adapters, hub ids, torch files, memory; alignment; atomic writes."""

from thetau.checkpoint.align import Alignment as Alignment
from thetau.checkpoint.align import align as align
from thetau.checkpoint.align import check_patterns as check_patterns
from thetau.checkpoint.align import matches as matches
from thetau.checkpoint.align import named as named
from thetau.checkpoint.dtypes import FLOATS as FLOATS
from thetau.checkpoint.dtypes import Dtype as Dtype
from thetau.checkpoint.dtypes import dtype_name as dtype_name
from thetau.checkpoint.naming import Kind as Kind
from thetau.checkpoint.naming import View as View
from thetau.checkpoint.naming import kind_of as kind_of
from thetau.checkpoint.naming import layer_of as layer_of
from thetau.checkpoint.naming import view_of as view_of
from thetau.checkpoint.naming import weighed_left as weighed_left
from thetau.checkpoint.opening import open_source as open_source
from thetau.checkpoint.opening import open_store as open_store
from thetau.checkpoint.roles import Role as Role
from thetau.checkpoint.roles import Roles as Roles
from thetau.checkpoint.roles import bring_tree as bring_tree
from thetau.checkpoint.slots import Slots as Slots
from thetau.checkpoint.source import Source as Source
from thetau.checkpoint.source import Spec as Spec
from thetau.checkpoint.writer import Writer as Writer
