"""``hrsam bench``: speed and memory beside the reference's data flow and other baselines, each checked before it is timed.

``timing``, ``gate`` and ``record`` know how to measure, ``flops`` counts, ``reference_flow`` is the baseline; ``encoder``,
``train_step``, ``click``, ``scan`` and ``attention`` say what is measured; ``command`` runs them.
"""
