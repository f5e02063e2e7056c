"""Task vectors in less room: compressed files, localised vectors stitched together, and what each way of keeping them takes."""

from thetau.compression.accounting import Storage as Storage
from thetau.compression.accounting import StorageRow as StorageRow
from thetau.compression.accounting import storage as storage
from thetau.compression.beside import keep_parts as keep_parts
from thetau.compression.beside import parts_beside as parts_beside
from thetau.compression.forms import Form as Form
from thetau.compression.forms import LowRank as LowRank
from thetau.compression.forms import Precision as Precision
from thetau.compression.forms import Sparse as Sparse
from thetau.compression.stitching import stitch as stitch
from thetau.compression.stitching import stored as stored
from thetau.compression.tasks import TaskStore as TaskStore
from thetau.compression.tasks import compress_tasks as compress_tasks
from thetau.compression.tasks import open_task as open_task
from thetau.compression.tasks import open_tasks as open_tasks
from thetau.compression.tasks import switch as switch
from thetau.compression.write import Compressed as Compressed
from thetau.compression.write import compress as compress
