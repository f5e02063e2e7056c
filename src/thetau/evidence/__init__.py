"""Evidence: what is learned or collected with a live model and data before a merge, kept as files of its own."""

from thetau.evidence.adamerging import Coefficients as Coefficients
from thetau.evidence.adamerging import learn_coefficients as learn_coefficients
from thetau.evidence.config import CoefficientConfig as CoefficientConfig
from thetau.evidence.config import FisherConfig as FisherConfig
from thetau.evidence.config import MaskConfig as MaskConfig
from thetau.evidence.config import MixtureConfig as MixtureConfig
from thetau.evidence.config import MomentConfig as MomentConfig
from thetau.evidence.config import RouterConfig as RouterConfig
from thetau.evidence.config import SurgeryConfig as SurgeryConfig
from thetau.evidence.fisher import Fisher as Fisher
from thetau.evidence.fisher import collect_fisher as collect_fisher
from thetau.evidence.fisher import fisher_sums as fisher_sums
from thetau.evidence.layerwise import MergedGrams as MergedGrams
from thetau.evidence.layerwise import collect_merged_grams as collect_merged_grams
from thetau.evidence.masks import Learned as Learned
from thetau.evidence.masks import Localised as Localised
from thetau.evidence.masks import learn_mask as learn_mask
from thetau.evidence.masks import localize as localize
from thetau.evidence.moments import SecondMoments as SecondMoments
from thetau.evidence.moments import collect_second_moments as collect_second_moments
from thetau.evidence.routers import Calibrated as Calibrated
from thetau.evidence.routers import calibrate_routers as calibrate_routers
from thetau.evidence.surgery import Surgery as Surgery
from thetau.evidence.surgery import learn_surgery as learn_surgery
from thetau.evidence.wemoe import Mixed as Mixed
from thetau.evidence.wemoe import learn_mixture as learn_mixture
