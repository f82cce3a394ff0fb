"""The family that makes models smaller and plainer without changing what they compute.

Each pass leaves no dead code behind, and each comes after those that it profits from, so a second run finds nothing.
"""

from ..registry import register_pipeline

register_pipeline(
    "clean",
    "remove-dead-code,infer-shapes,remove-identities,hoist-loop-invariants,"
    "fold-constants,fold-batchnorm,merge-duplicates,unify-names",
)
