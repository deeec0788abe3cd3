"""The listening study: what people say of generated clips, as mean opinion scores.

    python -m metrics.study select ...     per class, the clips that a classifier is surest of
    python -m metrics.study batches ...    ids that tell nothing, shuffled, cut into pages
    python -m metrics.study pages ...      questionnaires for browsers and crowd-sourcing services
    python -m metrics.study score ...      means, intervals, accuracy and kappa of the answers

Layouts of files, questions and published rules are those of the study in "It's Raw!" (Goel et al.
2022, arXiv:2202.09729, Appendix C.4), whose results `score` reads as well as ours.
"""
