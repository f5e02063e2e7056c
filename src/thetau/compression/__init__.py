"""Task vectors in less room: compressed files, localised vectors stitched together, and what each way of keeping them takes."""

from thetau.compression.compress import Compressed as Compressed
from thetau.compression.compress import compress as compress
from thetau.compression.forms import Form as Form
from thetau.compression.forms import LowRank as LowRank
from thetau.compression.forms import Precision as Precision
from thetau.compression.forms import Sparse as Sparse
from thetau.compression.stitch import stitch as stitch
from thetau.compression.stitch import stored as stored
from thetau.compression.storage import Storage as Storage
from thetau.compression.storage import StorageRow as StorageRow
from thetau.compression.storage import storage as storage
