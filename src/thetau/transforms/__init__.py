"""Stack → stack: one file a transform."""

from thetau.transforms.disentangle import Disentangle as Disentangle
from thetau.transforms.drop import Drop as Drop
from thetau.transforms.elect import Elect as Elect
from thetau.transforms.rank_drop import RankDrop as RankDrop
from thetau.transforms.rescale import Rescale as Rescale
from thetau.transforms.share import Share as Share
from thetau.transforms.stock import StockRatio as StockRatio
from thetau.transforms.trim import Trim as Trim
from thetau.transforms.truncate import Truncate as Truncate
from thetau.transforms.weigh import Weigh as Weigh
