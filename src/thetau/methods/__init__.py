"""Methods: named chains of parts, one file each, and the registry."""

from thetau.engine.types import PerPattern as PerPattern
from thetau.engine.types import PerTask as PerTask
from thetau.methods.average import Average as Average
from thetau.methods.awd import Awd as Awd
from thetau.methods.breadcrumbs import Breadcrumbs as Breadcrumbs
from thetau.methods.breadcrumbs import BreadcrumbsTies as BreadcrumbsTies
from thetau.methods.dare import DareLinear as DareLinear
from thetau.methods.dare import DareTies as DareTies
from thetau.methods.della import Della as Della
from thetau.methods.della import DellaLinear as DellaLinear
from thetau.methods.localize_stitch import LocalizeStitch as LocalizeStitch
from thetau.methods.model_stock import ModelStock as ModelStock
from thetau.methods.registry import Field as Field
from thetau.methods.registry import build as build
from thetau.methods.registry import describe as describe
from thetau.methods.registry import get as get
from thetau.methods.registry import name_of as name_of
from thetau.methods.registry import names as names
from thetau.methods.registry import paper as paper
from thetau.methods.registry import plain as plain
from thetau.methods.registry import register as register
from thetau.methods.task_arithmetic import TaskArithmetic as TaskArithmetic
from thetau.methods.ties import Ties as Ties
from thetau.methods.topk import TopK as TopK
from thetau.methods.wudi import Wudi as Wudi
