"""Which tensor of one checkpoint is which of another's, whatever library, version or wrapper named them: the one place that knows."""

from thetau.checkpoint.names.library import Library as Library
from thetau.checkpoint.names.library import bring_library as bring_library
from thetau.checkpoint.names.library import library_of as library_of
from thetau.checkpoint.names.matching import Matched as Matched
from thetau.checkpoint.names.matching import Names as Names
from thetau.checkpoint.names.matching import match as match
from thetau.checkpoint.names.matching import names_of as names_of
from thetau.checkpoint.names.renaming import renamed as renamed
from thetau.checkpoint.names.spelling import bare as bare
from thetau.checkpoint.names.spelling import spelled as spelled
from thetau.checkpoint.names.spelling import unwrapped as unwrapped
