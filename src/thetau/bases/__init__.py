"""Task vector bases: clusters of task vectors, a basis for each, and the online bank that keeps them."""

from thetau.bases.bank import Bank as Bank
from thetau.bases.bank import Basis as Basis
from thetau.bases.bank import Member as Member
from thetau.bases.bank import Operation as Operation
from thetau.bases.bank import Settings as Settings
from thetau.bases.bank import open_bank as open_bank
from thetau.bases.build import merge_groups as merge_groups
from thetau.bases.build import named_vectors as named_vectors
from thetau.bases.build import similarities as similarities
from thetau.bases.cluster import Clustering as Clustering
from thetau.bases.cluster import Similarity as Similarity
from thetau.bases.cluster import Spectrum as Spectrum
from thetau.bases.cluster import cluster as cluster
from thetau.bases.cluster import given_groups as given_groups
from thetau.bases.cluster import spectrum as spectrum
from thetau.bases.create import build as build
from thetau.bases.drift import drift_of as drift_of
from thetau.bases.online import forget as forget
from thetau.bases.online import insert as insert
from thetau.bases.online import rebuild as rebuild
from thetau.bases.partitions import all_partitions as all_partitions
from thetau.bases.partitions import random_partition as random_partition
from thetau.bases.placing import join_threshold as join_threshold
